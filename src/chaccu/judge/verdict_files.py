"""The cache of verdicts by what was asked, and the names that judging folders have for it and for the file of verdicts.

Invariant: a cached verdict is one whole file, so any number of runs may share a cache. It ignores what a verdict says.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from chaccu.artifact import atomic_file, storage_errors
from chaccu.errors import DataError
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
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is no verdict: {error}.", remedy="remove it; its question is asked again") from error

    def keep(self, verdict: Verdict) -> None:
        """Write it down, unless the same has been asked before."""
        file = self._file(verdict.key)
        if not file.is_file():
            with atomic_file(file) as whole:
                whole.write(msgspec.json.encode(verdict))

    def _file(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"
