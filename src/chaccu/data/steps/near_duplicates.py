"""Near duplicates: conversations that share nearly all their word sequences with an earlier one. The first in the input
stays.

MinHash over word shingles (Broder 1997), candidates by locality-sensitive hashing in bands, then the estimated Jaccard
similarity is held against the threshold. Text without spaces between words (Chinese, Japanese, Thai) is compared by its
runs between spaces only.
"""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any, ClassVar

import msgspec

from chaccu.conversation import Conversation
from chaccu.data.outcome import Index, Step
from chaccu.data.records import words_by_turn
from chaccu.errors import RecipeError

_SEED = 1


class NearDuplicates(Step, frozen=True):
    """`threshold`: Jaccard similarity from which a conversation is a near duplicate; `shingle_words`: words a shingle;
    `permutations` must be a multiple of `bands`: more are more exact and slower. Conversations under `min_words` are left
    alone."""

    name: ClassVar[str] = "near_duplicates"

    threshold: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.85
    shingle_words: Annotated[int, msgspec.Meta(ge=1, le=20)] = 3
    permutations: Annotated[int, msgspec.Meta(ge=16, le=1024)] = 128
    bands: Annotated[int, msgspec.Meta(ge=1)] = 16
    min_words: Annotated[int, msgspec.Meta(ge=1)] = 20

    def __post_init__(self) -> None:
        if self.permutations % self.bands:
            raise RecipeError(
                f"near_duplicates: {self.permutations} permutations cannot be cut into {self.bands} equal bands.",
                remedy="choose bands that divide permutations, such as 128 and 16",
            )

    def digest(self, conversation: Conversation) -> Any:
        """The conversation's MinHash, or None when it is too short to compare."""
        from rensa import RMinHash

        words = list(chain.from_iterable(words_by_turn(conversation)))
        if len(words) < max(self.min_words, self.shingle_words):
            return None
        sketch = RMinHash(num_perm=self.permutations, seed=_SEED)
        sketch.update(map(" ".join, zip(*(words[start:] for start in range(self.shingle_words)), strict=False)))
        return sketch

    def open_index(self) -> Index:
        return _SketchIndex(self)


class _SketchIndex:
    def __init__(self, settings: NearDuplicates) -> None:
        from rensa import RMinHashLSH

        self._threshold = settings.threshold
        self._bands = RMinHashLSH(threshold=settings.threshold, num_perm=settings.permutations, num_bands=settings.bands)
        self._sketches: list[Any] = []

    def admit(self, digest: Any) -> str | None:
        if digest is None:
            return None
        if any(digest.jaccard(self._sketches[key]) >= self._threshold for key in self._bands.query(digest)):
            return "near duplicate"
        self._bands.insert(len(self._sketches), digest)
        self._sketches.append(digest)
        return None
