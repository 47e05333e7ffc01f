"""Locks between processes: one writer at a time of a file or a folder.

Invariants: a lock is the kernel's (flock), so it ends with the process that holds it, however that ends; the empty file that
carries it stays and means nothing. It ignores readers, and writers that do not ask.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from chaccu.artifact import LOCK_NAME, storage_errors
from chaccu.errors import StorageError


@contextlib.contextmanager
def lock_file(path: Path, *, mode: int = 0o644) -> Iterator[None]:
    """Wait for the lock that `path` carries, and hold it for the block. Raises `StorageError`."""
    with _open(path, mode) as descriptor:
        with storage_errors(path):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Be the only writer of `folder`, which is made, for the block. Raises `StorageError` at once where another process is."""
    path = folder / LOCK_NAME
    with _open(path, 0o644) as descriptor:
        try:
            with storage_errors(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except StorageError as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise StorageError(
                    f"another run writes to {folder} now.", remedy="wait until it has ended, or give this one another --out"
                ) from None
            raise
        yield


@contextlib.contextmanager
def _open(path: Path, mode: int) -> Iterator[int]:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
