"""Zip files: which of their members hold conversations, and a member's bytes as a stream.

Invariant: members are read from inside the zip, never unpacked to disk. A zip without its table of contents (at its end, so
a zip that is cut off has none) cannot be read and raises one `DataError` that names it.
"""

from __future__ import annotations

import fnmatch
import zipfile
import zlib
from pathlib import Path
from typing import IO, cast

from chaccu.artifact import storage_errors
from chaccu.errors import DataError

_ZIP_MAGIC = b"PK\x03\x04"
# An account's export holds other lists beside its conversations.
_PREFERRED = "conversations*.json"
_SUFFIXES = (".json", ".jsonl", ".ndjson")


def is_zip(path: Path) -> bool:
    """Whether the file begins as a zip does."""
    with storage_errors(path), path.open("rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def list_members(path: Path, origin: str) -> list[zipfile.ZipInfo]:
    """The members to read, by name: `conversations*.json` where there are such, else every JSON file.

    Raises `DataError` for a zip that cannot be read and one that holds no JSON file.
    """
    with storage_errors(path):
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir() and member.file_size]
        except zipfile.BadZipFile as error:
            raise DataError(
                f"{origin} is a zip file that is cut off or damaged: {error}.",
                remedy="download it again, or repair it: zip -FF",
            ) from error
    members.sort(key=lambda member: member.filename)
    found = [member for member in members if fnmatch.fnmatch(Path(member.filename).name, _PREFERRED)]
    found = found or [member for member in members if member.filename.endswith(_SUFFIXES)]
    if not found:
        names = ", ".join(member.filename for member in members[:5]) or "nothing"
        raise DataError(
            f"{origin} holds no {' or '.join(_SUFFIXES)} file; it holds {names}.", remedy="unpack it and name a file"
        )
    return found


def open_member(file: IO[bytes], name: str, origin: str) -> tuple[zipfile.ZipExtFile, tuple[type[BaseException], ...]]:
    """The bytes of a member of the zip `file`, and the exceptions by which it says that it is damaged.

    Raises `DataError` for a member that is encrypted, packed in an unknown way, or whose beginning is damaged.
    """
    try:
        # A member that is open outlives its archive's closing; the file below stays the caller's.
        with zipfile.ZipFile(file) as archive:
            member = archive.open(name)
    except (RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{origin} cannot be read: {error}.", remedy="unpack it with another program and name the file"
        ) from error
    return cast(zipfile.ZipExtFile, member), (zipfile.BadZipFile, zlib.error, EOFError)
