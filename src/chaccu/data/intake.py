"""Sources to chunks of records: opens each source, finds its reader, groups records for the workers.

Invariants: every record of every source, as its reader groups them, is in exactly one chunk, in order. A source whose kind
nobody recognises, and a run in which no record at all was read, raise; a source that breaks off is told in `cuts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import msgspec

from chaccu.data.config import AUTO_READER
from chaccu.data.framing import Cut, RecordStream
from chaccu.data.judging import Chunk, are_parts
from chaccu.data.readers import list_readers, recognise_reader, regroup_records
from chaccu.data.records import RawRecord
from chaccu.data.sources import Source, SourceStream
from chaccu.errors import DataError

_CHUNK_BYTES = 1 << 20
_CHUNK_RECORDS = 1000
# Parts of one conversation go to one chunk, up to this.
_MOST_CHUNK_BYTES = 16 << 20
_LOOK_AHEAD_RECORDS = 100


class Progress(msgspec.Struct, frozen=True):
    """How far a run has read: bytes on disk of all sources, and records."""

    bytes_read: int
    bytes_total: int
    records: int


class SourceCut(msgspec.Struct, frozen=True):
    """A source that broke off, and where."""

    origin: str
    cut: Cut


class Intake:
    """Iterate once over it for chunks. `cuts` fills as sources end."""

    def __init__(self, sources: Sequence[Source], reader: str, progress: Callable[[Progress], None] | None = None) -> None:
        self._sources = sources
        self._reader = reader
        self._progress = progress
        self._total = sum(source.size_bytes for source in sources)
        self._records = 0
        self.cuts: list[SourceCut] = []

    def __iter__(self) -> Iterator[Chunk]:
        done_bytes = 0
        for source in self._sources:
            with SourceStream(source) as stream:
                records = RecordStream(stream, source.origin)
                for chunk in self._chunks_of(source, records):
                    self._records += len(chunk.records)
                    yield chunk
                    if self._progress is not None:
                        self._progress(Progress(done_bytes + stream.position_bytes, self._total, self._records))
            if records.cut is not None:
                self.cuts.append(SourceCut(source.origin, records.cut))
            done_bytes += source.size_bytes
            if self._progress is not None:
                self._progress(Progress(done_bytes, self._total, self._records))

    def _chunks_of(self, source: Source, stream: RecordStream) -> Iterator[Chunk]:
        records = iter(stream)
        first = list(islice(records, _LOOK_AHEAD_RECORDS))
        if not first:
            found = stream.cut.describe(source.origin) if stream.cut is not None else f"{source.origin} holds no record."
            raise DataError(f"no record could be read. {found}", remedy="check how the file was made or downloaded")
        reader = self._reader if self._reader != AUTO_READER else _recognise(source, first)
        group: list[RawRecord] = []
        size = 0
        for record in regroup_records(reader, chain(first, records)):
            full = size >= _CHUNK_BYTES or len(group) >= _CHUNK_RECORDS
            if full and (size >= _MOST_CHUNK_BYTES or not are_parts(reader, source.origin, group[-1], record)):
                yield Chunk(source.origin, reader, group)
                group, size = [], 0
            group.append(record)
            size += len(record.payload)
        if group:
            yield Chunk(source.origin, reader, group)


def _recognise(source: Source, records: Sequence[RawRecord]) -> str:
    for record in records:
        try:
            value = msgspec.json.decode(record.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # It will be in the ledger; another record shows what kind of file this is.
            continue
        name = recognise_reader(value)
        if name is not None:
            return name
    raise DataError(
        f"no reader recognises {source.origin}: none of its first {len(records)} records is a conversation of a known kind.",
        remedy=f"the readers are {', '.join(list_readers())}; set `reader:` in the configuration to read it all the same",
    )
