"""Files of JSON objects a line, as the judge's folders hold them.

Invariants: a file is written whole or not at all, or grows line by line, each on the disk (fsync) before it counts; a last
line that a kill cut off is not read, and no line is ever put behind half of another.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from chaccu.artifact import atomic_file, storage_errors
from chaccu.errors import DataError

_Line = TypeVar("_Line", bound=msgspec.Struct)


def read_json_lines(file: Path, kind: type[_Line], called: str, *, grows: bool = False) -> list[_Line]:
    """The objects of a file. `called`: what one is, for people; `grows`: half of a last line is no damage but what a kill left.

    Raises `StorageError`, `DataError` naming a bad line.
    """
    with storage_errors(file):
        data = file.read_bytes()
    decoder = msgspec.json.Decoder(kind)
    found = []
    lines = data.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            found.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # An editor may leave out the last end of line; what a kill cut off is no whole object.
            is_half = number == len(lines) and not data.endswith(b"\n") and not isinstance(error, msgspec.ValidationError)
            if grows and is_half:
                break
            raise DataError(
                f"line {number} of {file} is no {called}: {error}.", remedy="take the line out, or write to another folder"
            ) from error
    return found


def write_json_lines(file: Path, objects: Iterable[msgspec.Struct]) -> None:
    """The whole file anew. Raises `StorageError`."""
    with atomic_file(file) as whole:
        whole.writelines(map(_encode, objects))


class JsonLinesLog:
    """A file that begins with `objects` and grows within a block. Raises `StorageError`."""

    def __init__(self, file: Path, objects: Iterable[msgspec.Struct]) -> None:
        self._file = file
        write_json_lines(file, objects)
        with storage_errors(file):
            # Without a buffer: closing it after a full disk has nothing left to write, and fails no second time.
            self._out = file.open("ab", buffering=0)
            self._length = file.stat().st_size

    def __enter__(self) -> JsonLinesLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._out.close()

    def append(self, objects: Iterable[msgspec.Struct]) -> None:
        """Have them on the disk when this returns; where that fails, nothing of them stays."""
        left = memoryview(b"".join(map(_encode, objects)))
        with storage_errors(self._file):
            try:
                while left:
                    left = left[self._out.write(left) :]
                os.fsync(self._out.fileno())
            except OSError:
                os.ftruncate(self._out.fileno(), self._length)
                raise
            self._length = os.fstat(self._out.fileno()).st_size


def _encode(one: msgspec.Struct) -> bytes:
    return msgspec.json.encode(one) + b"\n"
