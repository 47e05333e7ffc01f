"""Files of JSON objects a line, as the judge's folders hold them.

Invariants: a file is written whole or not at all; a last line without its end, which a kill cut off, is not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from chaccu.artifact import atomic_file, storage_errors
from chaccu.errors import DataError

_Line = TypeVar("_Line", bound=msgspec.Struct)


def read_json_lines(file: Path, kind: type[_Line], called: str) -> list[_Line]:
    """The objects of a file. `called`: what one is, for people. Raises `StorageError`, `DataError` naming a bad line."""
    with storage_errors(file):
        data = file.read_bytes()
    decoder = msgspec.json.Decoder(kind)
    found = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise DataError(
                f"line {number} of {file} is no {called}: {error}.", remedy="take the line out, or write to another folder"
            ) from error
    return found


def write_json_lines(file: Path, objects: Iterable[msgspec.Struct]) -> None:
    """The whole file anew. Raises `StorageError`."""
    with atomic_file(file) as whole:
        whole.writelines(msgspec.json.encode(one) + b"\n" for one in objects)
