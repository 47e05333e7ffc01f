"""`ConversationLog`: answers, each with its conversation, as JSON lines in `conversations-YYYY-MM-DD.jsonl` (UTC).

Invariants: a line is appended whole by one write, and begins on a line of its own even where an earlier write was torn;
requests never wait for the disk: a thread writes, what waits for it is bounded, and what cannot be written is counted in
`lost` and said once an outage. It ignores how an answer came together.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from chaccu.errors import StorageError
from chaccu.serve.gateway.logged_answer import LoggedAnswer, UnreadableAnswerError

_MAX_WAITING = 1000
_MAX_WAITING_BYTES = 64 * 2**20
# Losses nearer to one another than this are one outage.
_QUIET_S = 60.0
_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
_CLOSE_S = 5.0
_log = logging.getLogger(__name__)


class ConversationLog:
    """The log in `folder`; its thread runs from the first answer until `close`. `clock` gives seconds since 1970.

    `written` counts lines, `lost` answers (or lines) that are not in the log. Raises `StorageError` when the folder cannot be
    written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], float] = time.time,
        max_waiting: int = _MAX_WAITING,
        max_waiting_bytes: int = _MAX_WAITING_BYTES,
    ) -> None:
        self.written = 0
        self.lost = 0
        self._folder = folder
        self._clock = clock
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._changed = threading.Condition()
        self._waiting: deque[tuple[LoggedAnswer, datetime]] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self._lost_before: int | None = None
        self._last_loss_s = 0.0
        self._unreadable_said = False
        self._thread: threading.Thread | None = None
        self._check_folder()

    def add(self, answer: LoggedAnswer) -> None:
        """Have `answer` written, if it is one; returns at once, whatever the disk does."""
        if not answer.is_answered:
            return
        size = answer.size
        moment = datetime.fromtimestamp(self._clock(), UTC)
        with self._changed:
            if self._closed:
                self._lose("the gateway has ended")
                return
            if len(self._waiting) >= self._max_waiting or (
                self._waiting and self._waiting_bytes + size > self._max_waiting_bytes
            ):
                self._lose(f"{len(self._waiting):,} answers wait for the disk already")
                return
            self._waiting.append((answer, moment))
            self._waiting_bytes += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="conversation log", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Write what waits, for at most `timeout_s`; what comes later is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                _log.warning("the disk did not take the last conversations within %g s; they are not logged", timeout_s)
        if self.lost:
            _log.warning("%d answers are missing in the conversation log", self.lost)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                answer, moment = self._waiting.popleft()
                self._waiting_bytes -= answer.size
            self._write(self._encode(answer, moment), self._file_of(moment))

    def _write(self, lines: list[bytes], path: Path) -> None:
        if not lines:
            return
        written = 0
        try:
            # Opened anew each time: a file that was moved away, or a folder that is gone, is noticed.
            with _open_for_lines(path) as descriptor:
                for line in lines:
                    _append_line(descriptor, line)
                    written += 1
        except OSError as error:
            with self._changed:
                self._lose(f"{path}: {error.strerror or error}", len(lines) - written)
        self.written += written
        if written == len(lines):
            self._say_recovery()

    def _encode(self, answer: LoggedAnswer, moment: datetime) -> list[bytes]:
        stamp = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        try:
            return [msgspec.json.encode(line) + b"\n" for line in answer.lines(stamp)]
        except UnreadableAnswerError as error:
            why = error.message
        except Exception:
            # Whatever is wrong with one answer, the thread goes on with the next.
            _log.exception("an answer cannot be written as a line")
            why = "its error is above"
        with self._changed:
            self.lost += 1
        if not self._unreadable_said:
            self._unreadable_said = True
            _log.warning("an answer is not logged, and more of the kind will only be counted: %s", why)
        return []

    def _lose(self, why: str, count: int = 1) -> None:
        """Count what is lost, and say so if an outage begins with it. The caller holds the lock."""
        if self._lost_before is None:
            self._lost_before = self.lost
            _log.warning("conversations are not logged now (serving goes on): %s", why)
        self.lost += count
        self._last_loss_s = self._clock()

    def _say_recovery(self) -> None:
        with self._changed:
            if self._lost_before is not None and self._clock() - self._last_loss_s >= _QUIET_S:
                _log.warning("conversations are logged again; %d answers are missing", self.lost - self._lost_before)
                self._lost_before = None

    def _file_of(self, moment: datetime) -> Path:
        return self._folder / f"conversations-{moment:%Y-%m-%d}.jsonl"

    def _check_folder(self) -> None:
        """Make the folder, and try it, without leaving a file there."""
        today = self._file_of(datetime.fromtimestamp(self._clock(), UTC))
        try:
            self._folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.write(b"\n")
            if today.exists():
                with _open_for_lines(today):
                    pass
        except OSError as error:
            raise StorageError(
                f"conversations cannot be logged in {self._folder}: {error.strerror or error}.",
                remedy="--log-conversations with a folder that you may write to",
            ) from error


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
