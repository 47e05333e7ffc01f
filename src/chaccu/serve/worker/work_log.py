"""`WorkLog`: what a worker tells its operator of each request, one line when it has ended.

Invariant: a line holds ids and counts, no text of a prompt or an answer. It ignores how requests are worked on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from chaccu.serve.link import Generate, Piece, Question
from chaccu.serve.log_writer import LogWriter


class WorkLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request in a worker's log. `request_id` is the gateway's; `end` is the finish reason, or `cancelled`, or a failure's
    kind."""

    request_id: str
    model: str
    seconds: float
    first_text_seconds: float | None = None
    prompt_tokens: int
    completion_tokens: int
    end: str


class _Work(msgspec.Struct):
    request_id: str
    model: str
    began_s: float
    first_s: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0


class WorkLog:
    """Lines for `lines` about the requests of one connection, by their pieces; `clock` gives seconds."""

    def __init__(self, lines: LogWriter, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = lines
        self._clock = clock
        self._under_way: dict[int, _Work] = {}

    def begin(self, request: Generate | Question) -> None:
        """A request has come."""
        self._under_way[request.request] = _Work(request.request_id, request.model, self._clock())

    def take(self, piece: Piece) -> None:
        """The next piece of its answer; the last one ends it."""
        work = self._under_way[piece.request]
        work.tokens += piece.tokens
        work.prompt_tokens = piece.prompt_tokens or work.prompt_tokens
        if work.first_s is None and piece.text:
            work.first_s = self._clock() - work.began_s
        if piece.end is not None:
            del self._under_way[piece.request]
            self._write(work, piece)

    def _write(self, work: _Work, last: Piece) -> None:
        failed = None if last.failure is None else last.failure.kind
        line = WorkLine(
            request_id=work.request_id,
            model=work.model,
            seconds=round(self._clock() - work.began_s, 6),
            first_text_seconds=None if work.first_s is None else round(work.first_s, 6),
            prompt_tokens=work.prompt_tokens,
            completion_tokens=work.tokens,
            end=failed or last.end or "",
        )
        self._lines.tell(logging.WARNING if failed == "engine_failed" else logging.INFO, "request", line)
