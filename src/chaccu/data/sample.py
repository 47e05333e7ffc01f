"""`data sample`: some conversations of a file or dataset, the same ones whenever the seed is the same.

A conversation's lot is a hash of the seed and its line, so a sample does not depend on the order of the input, and of two
samples with one seed the larger holds the smaller. Equal conversations are taken or left together; by source, the parts of
one conversation are. Whatever is taken is written as it stands, in the order of the input.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec

from chaccu.artifact import atomic_file, storage_errors
from chaccu.data.records import list_files, read_conversations
from chaccu.errors import DataError, UsageError


class SampleReport(msgspec.Struct, frozen=True):
    """Conversations read, and taken."""

    read: int
    taken: int


def sample_conversations(
    path: Path, out: Path, *, count: int | None = None, share: float | None = None, seed: int = 0, by_source: bool = False
) -> SampleReport:
    """Write `count` conversations, or about `share` of them, of a JSONL file or a dataset's training file to the file `out`.

    By source, `count` is of source conversations. Raises `UsageError` unless exactly one of `count` and `share` is given and
    in range, `StorageError` and `DataError` when the input cannot be read or nothing of it is taken.
    """
    if (count is None) == (share is None):
        raise UsageError("a sample needs a count or a share.", remedy="give either --count or --share")
    if count is not None and count < 1:
        raise UsageError(f"the count is {count}.", remedy="give at least 1")
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"the share is {share}.", remedy="give a share above 0 and up to 1, such as 0.1")
    limit = share if share is not None else _limit_of(path, count or 1, seed, by_source=by_source)
    read = taken = 0
    with storage_errors(path), atomic_file(out) as file:
        for line, lot in _lots(path, seed, by_source=by_source):
            read += 1
            if lot < limit:
                taken += 1
                file.write(line)
        if not taken:
            raise DataError(f"none of {read:,} conversations of {path} is taken.", remedy="take a larger share")
    return SampleReport(read, taken)


def _limit_of(path: Path, count: int, seed: int, *, by_source: bool) -> float:
    """The lot just above the lowest `count` different ones."""
    lowest: list[float] = []
    held: set[float] = set()
    for _, lot in _lots(path, seed, by_source=by_source):
        if lot in held:
            continue
        held.add(lot)
        heapq.heappush(lowest, -lot)
        if len(lowest) > count + 1:
            held.discard(-heapq.heappop(lowest))
    return -lowest[0] if len(lowest) > count else 1.0


def _lots(path: Path, seed: int, *, by_source: bool) -> Iterator[tuple[bytes, float]]:
    """Each conversation's line and its lot in [0, 1). A conversation that is there twice has its lot twice as well."""
    encode = msgspec.json.Encoder().encode
    for conversation in read_conversations(list_files(path)[0]):
        line = encode(conversation) + b"\n"
        drawn = (conversation.source or conversation.id).encode() if by_source else line
        digest = blake2b(f"{seed}:".encode() + drawn, digest_size=6).digest()
        yield line, int.from_bytes(digest, "big") / 2.0**48
