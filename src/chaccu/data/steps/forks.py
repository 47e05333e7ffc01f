"""Forks: conversations that begin with the same rounds, byte for byte, because one was shared twice on its way.

A conversation all of whose rounds an earlier one begins with holds nothing new: it is dropped whatever the setting. What
else is to become of forks, conversations that go on differently after a shared beginning, says `keep`.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, ClassVar, Literal

import msgspec

from chaccu.conversation import Conversation
from chaccu.data.outcome import Index, Step
from chaccu.data.rounds import split_rounds

Count = Annotated[int, msgspec.Meta(ge=1)]
SHORTER_FORK = "fork of a longer conversation"


class ForkDigest(msgspec.Struct, frozen=True):
    """Hashes of the conversation's beginnings, one a round, the place of the shortest that is long enough to make forks, and
    the characters of all turns."""

    beginnings: tuple[int, ...]
    stem: int | None
    chars: int

    @property
    def group(self) -> int | None:
        """What forks of one conversation have in common."""
        return None if self.stem is None else self.beginnings[self.stem]


class Forks(Step, frozen=True):
    """`keep`: `all` forks, only the `first` in the input, or only the `longest` (of those that all other steps keep; the
    run then holds them on disk until it has read everything, and these drops come last in the ledger). Conversations are
    forks when their first `shared_rounds` are the same and these, or as many more as it takes, hold `shared_chars`
    characters (a greeting alone is no shared history)."""

    name: ClassVar[str] = "forks"

    keep: Literal["all", "first", "longest"] = "all"
    shared_rounds: Count = 1
    shared_chars: Count = 300

    def digest(self, conversation: Conversation) -> ForkDigest:
        """64 bits a beginning: among a hundred million beginnings a false match has odds of about 1 in 3,700."""
        hashed = blake2b(f"{conversation.system}\x1e".encode(), digest_size=8)
        beginnings = []
        chars = 0
        stem = None
        for number, turns in enumerate(split_rounds(conversation.messages), start=1):
            for message in turns:
                text = message.content or ""
                chars += len(text)
                hashed.update(f"{message.role}\x1f{text}\x1e".encode())
            beginnings.append(int.from_bytes(hashed.digest(), "big"))
            if stem is None and number >= self.shared_rounds and chars >= self.shared_chars:
                stem = number - 1
        return ForkDigest(tuple(beginnings), stem, chars)

    def open_index(self) -> Index:
        return _Beginnings(self)


class _Beginnings:
    def __init__(self, settings: Forks) -> None:
        self._only_first = settings.keep == "first"
        self._seen: set[int] = set()

    def admit(self, digest: ForkDigest) -> str | None:
        if digest.beginnings[-1] in self._seen:
            return "beginning of an earlier conversation"
        if self._only_first and digest.group in self._seen:
            return "fork of an earlier conversation"
        self._seen.update(digest.beginnings)
        return None
