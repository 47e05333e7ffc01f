"""Which of a group of kept conversations is the longest is known only when all have been read: until then they wait on disk.

Invariants: what goes in comes out in order, each with whether it is its group's longest (of equals the first); outside of a
group everything wins. In memory there are a few numbers a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from chaccu.data.judging import JoinedRecord, Kept


class Contestant(msgspec.Struct, frozen=True):
    """A judged record and its conversations to be; `group` is None when it has no rivals, `size` is in characters."""

    id: str
    origin: str
    snippet: str
    joined: tuple[JoinedRecord, ...]
    kept: tuple[Kept, ...]
    group: int | None
    size: int


class Contest:
    """Holds contestants in a file of `folder`, which `settle` removes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "waiting.bin"
        self._file = self._path.open("wb")
        self._encoder = msgspec.msgpack.Encoder()
        self._count = 0
        self._longest: dict[int, tuple[int, int]] = {}

    def add(self, contestant: Contestant) -> None:
        """Take one more, in the order of the input."""
        data = self._encoder.encode(contestant)
        self._file.write(len(data).to_bytes(8, "little") + data)
        if contestant.group is not None:
            best = self._longest.get(contestant.group)
            if best is None or contestant.size > best[0]:
                self._longest[contestant.group] = (contestant.size, self._count)
        self._count += 1

    def settle(self) -> Iterator[tuple[Contestant, bool]]:
        """Each contestant in order, and whether it is the longest of its group."""
        self._file.close()
        decoder = msgspec.msgpack.Decoder(Contestant)
        with self._path.open("rb") as file:
            for number in range(self._count):
                contestant = decoder.decode(file.read(int.from_bytes(file.read(8), "little")))
                yield contestant, contestant.group is None or self._longest[contestant.group][1] == number
        self._path.unlink()
