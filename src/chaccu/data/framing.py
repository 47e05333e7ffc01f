"""A byte stream cut into records: a JSON array, JSON lines, or JSON objects one after another.

Only brackets and strings are looked at here, so a record that is bad inside costs itself alone, each record's byte offsets
are exact, and records travel as bytes until a worker decodes them. (A JSON event parser such as ijson gives no offsets,
stops at the first byte it dislikes, turns lone surrogates into question marks, and needs memory quadratic in the nesting
depth.)

Invariants: memory is that of the longest record and a read buffer, however long the stream. A stream that ends inside a
record yields everything whole and sets `cut`; it does not raise. Numbers count from 1 over everything between the array's
commas, whatever its type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

import msgspec

from chaccu.data.records import RawRecord
from chaccu.errors import DataError

_READ_BYTES = 1 << 20
MAX_RECORD_BYTES = 512 << 20

# Runs of anything but brackets, whole strings skipped, up to: a bracket, an unclosed string's quote, or the end of the buffer.
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{}"]|\Z)', re.DOTALL)
_GAP = b" \t\r\n,"


class Cut(msgspec.Struct, frozen=True):
    """Where a stream broke off: `offset` (bytes, decompressed) is the end of the last whole record, number `after_record`
    of its file; `unread_bytes` follow it up to `size_bytes`, where the stream ends."""

    offset: int
    after_record: int
    unread_bytes: int
    size_bytes: int
    why: str

    def describe(self, origin: str) -> str:
        """One sentence for people."""
        return (
            f"{origin} is cut off at byte {self.size_bytes:,} ({self.why}): everything up to byte {self.offset:,} was read, "
            f"{self.after_record:,} whole records; {self.unread_bytes:,} bytes after record {self.after_record:,} are unread."
        )


class _Readable(Protocol):
    damage: str

    def read(self, size: int, /) -> bytes: ...


class RecordStream:
    """Iterate over it for `RawRecord`s; afterwards `cut` is None or says where the stream broke off.

    Raises `DataError` on iteration when the stream holds neither an array nor objects.
    """

    def __init__(self, stream: _Readable, name: str) -> None:
        self._stream = stream
        self._name = name
        self._buffer = b""
        self._base = 0
        self._number = 0
        self._last_end = 0
        self.cut: Cut | None = None

    def __iter__(self) -> Iterator[RawRecord]:
        while not self._buffer.strip(b" \t\r\n\xef\xbb\xbf") and self._fill():
            pass
        body = self._buffer.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
        self._drop(len(self._buffer) - len(body))
        self._last_end = self._base
        if not body and self._stream.damage:
            raise DataError(f"{self._name} cannot be read: {self._stream.damage}.", remedy="download it again")
        if not body:
            raise DataError(f"{self._name} holds nothing but white space.", remedy="check how the file was made or downloaded")
        if body[:1] == b"[":
            self._drop(1)
            self._last_end = self._base
            return self._read_nested(inside_array=True)
        if body[:1] != b"{":
            raise DataError(
                f"{self._name} is no JSON array and no JSON lines: it begins with {body[:20]!r}.",
                remedy="give JSON or JSON lines in UTF-8, plain or in gzip, zstd or zip, or a parquet file",
            )
        return self._read_lines() if self._looks_like_lines() else self._read_nested(inside_array=False)

    def _fill(self, size: int = _READ_BYTES) -> bool:
        more = self._stream.read(size)
        self._buffer += more
        return bool(more)

    def _drop(self, count: int) -> None:
        self._buffer = self._buffer[count:]
        self._base += count

    def _record(self, begin: int, end: int) -> RawRecord:
        self._number += 1
        self._last_end = self._base + end
        return RawRecord(self._number, self._buffer[begin:end], self._base + begin, self._base + end)

    def _set_cut(self, why: str) -> None:
        size = self._base + len(self._buffer)
        self.cut = Cut(self._last_end, self._number, size - self._last_end, size, self._stream.damage or why)

    def _looks_like_lines(self) -> bool:
        """Whether any of the first lines is an object by itself; a pretty-printed object has none."""
        while b"\n" not in self._buffer and self._fill():
            pass
        return any(_is_object(line) for line in self._buffer.splitlines()[:20])

    def _read_lines(self) -> Iterator[RawRecord]:
        begin = 0
        while True:
            end = self._buffer.find(b"\n", begin)
            if end >= 0:
                if self._buffer[begin:end].strip():
                    yield self._record(begin, end)
                begin = end + 1
                continue
            self._drop(begin)
            begin = 0
            if len(self._buffer) > MAX_RECORD_BYTES:
                return self._set_cut(f"a line longer than {MAX_RECORD_BYTES:,} bytes")
            if not self._fill(max(_READ_BYTES, len(self._buffer))):
                break
        if self._buffer.strip():
            # The last line has no newline: whole if it decodes, cut off if not.
            if not _is_object(self._buffer):
                return self._set_cut(f"inside record {self._number + 1:,}")
            yield self._record(0, len(self._buffer))
        if self._stream.damage:
            self._set_cut("")
        return None

    def _read_nested(self, *, inside_array: bool) -> Iterator[RawRecord]:
        """Records between brackets of depth 0; what stands between them (scalars in an array, rubbish) is a record too."""
        while True:
            depth, begin, gap = 0, 0, 0
            for match in _TO_BRACKET.finditer(self._buffer):
                at = match.start(1)
                mark = match[1]
                if mark in (b"", b'"'):
                    break
                if mark in (b"[", b"{"):
                    if depth == 0:
                        yield from self._read_gap(gap, at)
                        begin = gap = at
                    depth += 1
                elif depth == 0 and not inside_array:
                    yield from self._read_gap(gap, at + 1)
                    gap = at + 1
                elif depth == 0:
                    yield from self._read_gap(gap, at)
                    self._drop(at + 1)
                    return (yield from self._read_rest())
                else:
                    depth -= 1
                    if depth == 0:
                        yield self._record(begin, at + 1)
                        gap = at + 1
            self._drop(gap)
            if len(self._buffer) > MAX_RECORD_BYTES:
                return self._set_cut(f"a record longer than {MAX_RECORD_BYTES:,} bytes")
            # A long record is scanned again from its beginning, so each time twice as much is read: linear in all.
            if not self._fill(max(_READ_BYTES, len(self._buffer))):
                break
        rest = self._buffer.strip(_GAP)
        if rest or inside_array or self._stream.damage:
            self._set_cut(f"inside record {self._number + 1:,}" if rest else "before the array's closing bracket")
        return None

    def _read_gap(self, begin: int, end: int) -> Iterator[RawRecord]:
        text = self._buffer[begin:end].strip(_GAP)
        if not text:
            return
        try:
            scalars = msgspec.json.decode(b"[" + text + b"]", type=list[msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            scalars = [msgspec.Raw(text)]
        for scalar in scalars:
            record = self._record(begin, end)
            yield msgspec.structs.replace(record, payload=bytes(scalar))

    def _read_rest(self) -> Iterator[RawRecord]:
        """What follows the array's end: nothing, or rubbish that is one unreadable record."""
        extra = b""
        while True:
            extra = (extra + self._buffer.lstrip(b" \t\r\n\x00"))[:1000]
            self._drop(len(self._buffer))
            if not self._fill():
                break
        if extra:
            self._number += 1
            yield RawRecord(self._number, extra, self._base, self._base)
        if self._stream.damage:
            self._set_cut("")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
