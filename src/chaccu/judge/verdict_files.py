"""The files of a judging folder while it is made: verdicts as they come, and the cache of verdicts by what was asked.

Invariants: a verdict is on the disk (fsync) before it counts; a line that a kill cut off is dropped; a cached verdict is one
whole file, so any number of runs may share a cache. It ignores what a verdict says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import msgspec

from chaccu.artifact import atomic_file, storage_errors
from chaccu.errors import DataError
from chaccu.judge.json_lines import write_json_lines
from chaccu.judge.verdicts import Verdict

VERDICTS_NAME = "verdicts.jsonl"
CACHE_NAME = "cache"


class VerdictCache:
    """Verdicts by key, one file each: `FOLDER/ab/abcd….json`. Raises `StorageError`, `DataError` for a file that is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str) -> Verdict | None:
        """What was said when the same was asked, if it was."""
        file = self._file(key)
        if not file.is_file():
            return None
        with storage_errors(file):
            data = file.read_bytes()
        try:
            return msgspec.json.decode(data, type=Verdict)
        except msgspec.DecodeError as error:
            raise DataError(f"{file} is no verdict: {error}.", remedy="remove it; its question is asked again") from error

    def keep(self, verdict: Verdict) -> None:
        """Write it down, unless the same has been asked before."""
        file = self._file(verdict.key)
        if not file.is_file():
            with atomic_file(file) as whole:
                whole.write(msgspec.json.encode(verdict))

    def _file(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


class VerdictLog:
    """`verdicts.jsonl` in a block: it begins with `verdicts`, and more are appended. Raises `StorageError`."""

    def __init__(self, file: Path, verdicts: Iterable[Verdict]) -> None:
        self._file = file
        write_json_lines(file, verdicts)
        with storage_errors(file):
            self._out = file.open("ab")

    def __enter__(self) -> VerdictLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._out.close()

    def append(self, verdicts: Iterable[Verdict]) -> None:
        """Have them on the disk when this returns."""
        with storage_errors(self._file):
            self._out.write(b"".join(msgspec.json.encode(verdict) + b"\n" for verdict in verdicts))
            self._out.flush()
            os.fsync(self._out.fileno())
