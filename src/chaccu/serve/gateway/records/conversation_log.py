"""`ConversationLog`: answers, each with its conversation, on their way to a store.

Invariants: requests never wait for the store: a thread writes, what waits for it is bounded, and what is not kept is counted in
`lost` and said once an outage. It ignores how an answer came together, and where the store keeps it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from chaccu.serve.gateway.records.conversation_store import ConversationStore, NotKeptError, Record
from chaccu.serve.gateway.records.logged_answer import LoggedAnswer, UnreadableAnswerError

_MAX_WAITING = 1000
_MAX_WAITING_BYTES = 64 * 2**20
# Losses nearer to one another than this are one outage.
_QUIET_S = 60.0
_CLOSE_S = 5.0
_log = logging.getLogger(__name__)


class ConversationLog:
    """The log in `store`, which it closes; its thread runs from the first answer until `close`. `clock` gives seconds since
    1970.

    `written` counts lines, `lost` answers (or lines) that are not in the log.
    """

    def __init__(
        self,
        store: ConversationStore,
        *,
        clock: Callable[[], float] = time.time,
        max_waiting: int = _MAX_WAITING,
        max_waiting_bytes: int = _MAX_WAITING_BYTES,
    ) -> None:
        self.written = 0
        self.lost = 0
        self._store = store
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
        if self._thread is None or not self._thread.is_alive():
            self._store.close()
        else:
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
                taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._store.most_at_once))]
                self._waiting_bytes -= sum(answer.size for answer, _ in taken)
            self._write([record for answer, moment in taken for record in self._encode(answer, moment)])

    def _write(self, records: list[Record]) -> None:
        if not records:
            return
        lost = 0
        try:
            self._store.write(records)
        except NotKeptError as error:
            lost = error.count
            with self._changed:
                self._lose(error.message, lost)
        except Exception as error:
            # Whatever is wrong with these, the thread goes on with the next; what an error says may be people's words.
            lost = len(records)
            with self._changed:
                self._lose(f"the store failed ({type(error).__name__})", lost)
        self.written += len(records) - lost
        if not lost:
            self._say_recovery()

    def _encode(self, answer: LoggedAnswer, moment: datetime) -> list[Record]:
        stamp = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        try:
            return [Record(line, msgspec.json.encode(line), moment) for line in answer.lines(stamp)]
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
