"""`HashedFile`: a file written once, with its SHA-256.

Invariant: the bytes are hashed on their way, by a thread of its own, so that two pieces at most are in memory: the one in hand
and the one before.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from chaccu.artifact import FileEntry


class HashedFile:
    """A file to write, as a context; `entry` is its size and SHA-256 once the context has been left without an error.

    What was given to `write` must not be changed afterwards.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._size = 0
        self._hashing: Future[None] | None = None
        self.entry: FileEntry | None = None

    def __enter__(self) -> HashedFile:
        self._file = self._path.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(1)
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`. Raises `OSError`."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._thread.submit(self._hash.update, view)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._size += len(view)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._hashing is not None:
            self._hashing.result()
        self._thread.shutdown()
        self._file.close()
        if kind is None:
            self.entry = FileEntry(self._size, self._hash.hexdigest())
