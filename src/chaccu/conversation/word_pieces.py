"""`WordPieces`: SentencePiece-like BPE a word at a time, with the ids of words seen before at hand.

Such tokenizers take a whole text for one word, so nothing of it is ever found in a cache. But there are places that no token
spans: between characters x and y where no token of the vocabulary holds x followed by y. A merge always makes a token of the
vocabulary, so none ever joins the two sides, and a text cut there has the same ids. Most words of a text are then in a cache of
modest size, which is quicker than the tokenizer by far.

Invariants: ids are exactly the tokenizer's; the cache is bounded, and may be used by several threads.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, filterfalse, pairwise
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

ID_BYTES = array("i").itemsize
_MARK = "▁"
_MAX_WORDS = 1 << 17  # in each of the cache's two generations
_MAX_WORD_CHARS = 48  # longer ones, such as a sentence of Chinese, hardly come again
_WORD_CHAR = re.compile(r"\w")


class _Cache(dict[str, bytes]):
    """Ids by word, as `pack_ids` packs them; a word that is not there is encoded by itself."""

    def __init__(self, encode: Callable[[Sequence[str]], list[bytes]], older: dict[str, bytes]) -> None:
        super().__init__()
        self._encode = encode
        self.older = older

    def __missing__(self, word: str) -> bytes:
        return self.older.get(word) or self._encode([word])[0]


class WordPieces:
    """Encodes texts that continue others. `encode`: the tokenizer, for words; `pairs`: see `adjacent_characters`. Ids are
    packed, as `pack_ids` does it: joining bytes is quicker than joining lists."""

    def __init__(self, encode: Callable[[Sequence[str]], list[bytes]], pairs: Iterable[str]) -> None:
        self._encode = encode
        self._word = re.compile(_word_pattern(pairs))
        self._cache = _Cache(encode, {})

    def split(self, text: str) -> list[str]:
        """The words of a text; joined they are the text."""
        # A mark that the text itself holds is a space to the tokenizer, but not to the pattern.
        return [text] if _MARK in text else self._word.findall(text)

    def encode_texts(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text, none of them special."""
        return self.encode_words([self.split(text) for text in texts])

    def encode_words(self, texts: Sequence[Sequence[str]]) -> list[bytes]:
        """Ids of texts that are split already."""
        cache, passing = self._learn(texts)
        encoded = [b"".join(map(cache.__getitem__, words)) for words in texts]
        for word in passing:
            cache.pop(word, None)
        return encoded

    def _learn(self, texts: Sequence[Sequence[str]]) -> tuple[_Cache, list[str]]:
        """The cache with every word of the texts in it, and those that are not to stay: they hardly come again."""
        cache = self._cache
        if len(cache) > _MAX_WORDS:
            # What is still in use moves over; the rest goes with the older one. Nothing is emptied under another thread.
            cache = self._cache = _Cache(self._encode, dict(cache))
        unknown = dict.fromkeys(filterfalse(cache.__contains__, chain.from_iterable(texts)))
        older = cache.older
        fresh = list(filterfalse(older.__contains__, unknown))
        cache.update((word, older[word]) for word in unknown if word in older)
        cache.update(zip(fresh, self._encode(fresh), strict=True))
        return cache, [word for word in fresh if len(word) > _MAX_WORD_CHARS]


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as 32-bit integers in the machine's order."""
    return array("i", ids).tobytes()


def unpack_ids(packed: bytes) -> list[int]:
    """The ids that `pack_ids` packed."""
    return array("i", packed).tolist()


def _word_pattern(pairs: Iterable[str]) -> str:
    """What is never cut: a run of spaces with what follows it; letters; other signs; and where a pair may belong to a token."""
    into_space: list[str] = []
    into_sign: tuple[list[str], list[str]] = ([], [])
    into_letter: tuple[list[str], list[str]] = ([], [])
    newlines = True
    for left, right in map(tuple, pairs):
        if right == _MARK:
            into_space.append(left)
        if "\n" in (left, right) and left != right:
            newlines = False
        if _MARK not in (left, right) and bool(_WORD_CHAR.match(left)) != bool(_WORD_CHAR.match(right)):
            lefts, rights = into_sign if _WORD_CHAR.match(left) else into_letter
            lefts.append(left)
            rights.append(right)
    sign = r"[^\w \n]" if newlines else r"[^\w ]"
    run = rf"(?:\w+|{sign}+)"
    glue = [rf"(?<={_one_of(into_space)}) +{run}?"] if into_space else []
    glue += [rf"(?<={_one_of(lefts)})(?={_one_of(rights)}){run}" for lefts, rights in (into_sign, into_letter) if lefts]
    glued = rf"(?:{'|'.join(glue)})*" if glue else ""
    return rf" *{run}{glued}| +|\n+"


def _one_of(characters: Iterable[str]) -> str:
    return f"[{''.join(re.escape(character) for character in sorted(set(characters)))}]"


def adjacent_characters(backend: Tokenizer) -> set[str] | None:
    """Every pair of characters that stand side by side in a token of `backend`, spaces as marks; None when it is of another
    kind than BPE over the whole text, written with marks for spaces and nothing else done to it."""
    model = backend.model
    if not isinstance(model, BPE) or backend.pre_tokenizer is not None or not _only_marks_spaces(backend):
        return None
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    tokens = chain(backend.get_vocab(with_added_tokens=False), (token.content.replace(" ", _MARK) for token in added))
    return {left + right for token in tokens for left, right in pairwise(token)}


def _only_marks_spaces(backend: Tokenizer) -> bool:
    if backend.normalizer is None:
        return False
    normalizer: dict[str, Any] = json.loads(backend.normalizer.__getstate__())
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return bool(steps == [{"type": "Replace", "pattern": {"String": " "}, "content": _MARK}])
