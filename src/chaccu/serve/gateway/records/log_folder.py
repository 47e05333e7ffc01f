"""`LogFolder`: conversations as JSON lines in `conversations-YYYY-MM-DD.jsonl` (UTC) of a folder.

Invariants: a line is appended whole by one write, and begins on a line of its own even where an earlier write was torn; files
and a folder that it makes are for their owner alone; a file that was moved away, or a folder that has come back, is noticed
with the next line.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from chaccu.errors import StorageError
from chaccu.serve.gateway.records.conversation_store import NotKeptError, Record

_FOLDER_MODE = 0o700
_FILE_MODE = 0o600


class LogFolder:
    """The files in `folder`; `clock` gives seconds since 1970. Raises `StorageError` when the folder cannot be written."""

    most_at_once = 1

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        today = self._file_of(datetime.fromtimestamp(clock(), UTC))
        try:
            folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
            # Tried without leaving a file there.
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"\n")
            if today.exists():
                with _open_for_lines(today):
                    pass
        except OSError as error:
            raise StorageError(
                f"conversations cannot be logged in {folder}: {error.strerror or error}.",
                remedy="--log-conversations with a folder that you may write to",
            ) from error

    def write(self, records: Sequence[Record]) -> None:
        written = 0
        for path, lines in groupby(records, lambda record: self._file_of(record.moment)):
            try:
                # Opened anew each time: a file that was moved away, or a folder that is gone, is noticed.
                with _open_for_lines(path) as descriptor:
                    for record in lines:
                        _append_line(descriptor, record.data + b"\n")
                        written += 1
            except OSError as error:
                raise NotKeptError(f"{path}: {error.strerror or error}", len(records) - written) from error

    def close(self) -> None:
        """Nothing is open."""

    def _file_of(self, moment: datetime) -> Path:
        return self._folder / f"conversations-{moment:%Y-%m-%d}.jsonl"


@contextmanager
def _open_for_lines(path: Path) -> Iterator[int]:
    """A descriptor for appending to `path`, which only its owner may read."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _append_line(descriptor: int, line: bytes) -> None:
    """Append `line` by one write, behind a newline where the file does not end with one. Raises `OSError`."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    if os.write(descriptor, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
