"""Training and validation files, split by source conversation: parts of one conversation are never on both sides.

A source's side follows from a hash of its name and the seed, so it stays where it is when other data comes or goes, and
equal names in two dumps go together. Invariant: with a share above 0 and two sources or more, neither file is empty (the
source with the lowest, or highest, hash crosses over if need be).
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import msgspec

from chaccu.conversation import Conversation
from chaccu.data.judging import Kept
from chaccu.data.records import bare_source

TRAIN_NAME = "train.jsonl"
VALIDATION_NAME = "validation.jsonl"


def place_of(source: str, seed: int) -> float:
    """A source's place in [0, 1): it is validation when below the share."""
    digest = blake2b(f"{seed}:{bare_source(source)}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2.0**56


class PartitionWriter:
    """Writes `train.jsonl` and `validation.jsonl` into a folder; a context manager. `rows` counts lines by file name."""

    def __init__(self, folder: Path, *, validation_share: float, seed: int) -> None:
        self._paths = {name: folder / name for name in (TRAIN_NAME, VALIDATION_NAME)}
        self._share = validation_share
        self._seed = seed
        self._lowest: tuple[float, str] | None = None
        self._highest: tuple[float, str] | None = None
        self.rows = dict.fromkeys(self._paths, 0)

    def __enter__(self) -> PartitionWriter:
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if kind is None and self._share > 0 and self._lowest != self._highest:
            if not self.rows[VALIDATION_NAME] and self._lowest is not None:
                self._move(self._lowest[1], TRAIN_NAME, VALIDATION_NAME)
            elif not self.rows[TRAIN_NAME] and self._highest is not None:
                self._move(self._highest[1], VALIDATION_NAME, TRAIN_NAME)

    def add(self, kept: Kept) -> None:
        """Write one conversation to its side."""
        place = (place_of(kept.source, self._seed), bare_source(kept.source))
        self._lowest = min(self._lowest or place, place)
        self._highest = max(self._highest or place, place)
        name = VALIDATION_NAME if place[0] < self._share else TRAIN_NAME
        self._files[name].write(kept.line)
        self.rows[name] += 1

    def _move(self, source: str, from_name: str, to_name: str) -> None:
        """Move every line of one source to the other, empty file."""
        lines = self._paths[from_name].read_bytes().splitlines(keepends=True)
        moved = [line for line in lines if bare_source(msgspec.json.decode(line, type=Conversation).source) == source]
        stays = [line for line in lines if bare_source(msgspec.json.decode(line, type=Conversation).source) != source]
        self._paths[from_name].write_bytes(b"".join(stays))
        self._paths[to_name].write_bytes(b"".join(moved))
        self.rows = {from_name: len(stays), to_name: len(moved)}
