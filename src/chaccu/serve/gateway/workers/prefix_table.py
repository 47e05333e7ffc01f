"""Who has read a prompt's beginning before: `hash_prefix` and `PrefixTable`.

A prompt is cut into blocks, message by message, and each block is hashed together with all before it, so equal hashes mean
equal beginnings. The table says which workers were given a beginning. Invariants: it is bounded, and the entries used longest
ago go first; no text is kept. A hash is Python's own, salted in each process: two beginnings that share one by chance would
send a request to a worker that knows it not, and nothing worse. It ignores what a worker has since dropped from its cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

import msgspec

_BLOCK_CHARS = 1024
_MOST_BLOCKS = 256
_MOST_HOLDERS = 8


class Prefix(msgspec.Struct, frozen=True):
    """A prompt's blocks: the hash of all text up to the end of each, and how many characters that is."""

    model: str
    hashes: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


def hash_prefix(model: str, turns: Iterable[tuple[str, str]], before: Prefix | None = None) -> Prefix:
    """The prefix of a prompt to `model`, made of (role, text) in order; with `before`, of what that stands for and `turns`
    behind it. Blocks beyond the first 256, a quarter of a million characters, are left out.
    """
    hashes, ends = ([], []) if before is None else (list(before.hashes), list(before.ends))
    chain = hashes[-1] if hashes else hash(model)
    chars = ends[-1] if ends else 0
    for role, text in turns:
        for start in range(0, max(1, len(text)), _BLOCK_CHARS):
            if len(hashes) == _MOST_BLOCKS:
                return Prefix(model, tuple(hashes), tuple(ends))
            block = text[start : start + _BLOCK_CHARS]
            # Where a message begins is part of it: "ab" and "c" are not "a" and "bc".
            chain = hash((chain, role if start == 0 else None, block))
            chars += len(block) + (start == 0)
            hashes.append(chain)
            ends.append(chars)
    return Prefix(model, tuple(hashes), tuple(ends))


class PrefixTable:
    """Holders of beginnings, `size` blocks at most."""

    def __init__(self, size: int = 20_000) -> None:
        self._size = size
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, prefix: Prefix, holder: str) -> None:
        """`holder` has been given this prompt."""
        # The longest first: of a conversation that is going out of use the end is forgotten before its beginning.
        for block in reversed(prefix.hashes):
            holders = self._holders.get(block, ())
            if not holders or holders[-1] != holder:
                others = tuple(other for other in holders if other != holder)
                self._holders[block] = (*others[1 - _MOST_HOLDERS :], holder)
            self._holders.move_to_end(block)
        while len(self._holders) > self._size:
            self._holders.popitem(last=False)

    def cached(self, prefix: Prefix, among: Collection[str]) -> dict[str, float]:
        """The share of the prompt that each of `among` was given before, 0 to 1; without those that were given none."""
        shares: dict[str, float] = {}
        for block, end in zip(reversed(prefix.hashes), reversed(prefix.ends), strict=True):
            for holder in self._holders.get(block, ()):
                if holder in among:
                    shares.setdefault(holder, end / prefix.ends[-1])
            if len(shares) == len(among):
                break
        return shares
