"""`WorkLog`: what a worker tells its operator of each request, a line and a span when it has ended.

Invariant: they hold ids and counts, no text of a prompt or an answer. It ignores how requests are worked on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import get_args

import msgspec

from chaccu.serve.link import Detokenize, Embed, FailureKind, Generate, Piece, Question, Tokenize
from chaccu.serve.log_writer import LogWriter
from chaccu.serve.tracing import RequestSpan, Tracing, describe_answer

_LOST = "lost"
# Ends that are no finish reasons.
_UNFINISHED = frozenset({"cancelled", "failed", _LOST, *get_args(FailureKind)})
_BAD_ENDS = frozenset({"engine_failed", _LOST})


class WorkLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request in a worker's log. `request_id` is the gateway's; `end` is the finish reason, or `cancelled`, or a failure's
    kind, or `lost` where the engine was."""

    request_id: str
    model: str
    seconds: float
    first_text_seconds: float | None = None
    prompt_tokens: int
    completion_tokens: int
    end: str


class _Work(msgspec.Struct):
    request_id: str
    operation: str
    model: str
    began_s: float
    first_s: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    span: RequestSpan | None = None


class WorkLog:
    """Lines for `lines` and spans for `tracing` about the requests of one connection, by their pieces; `worker` is whose they
    are, `clock` gives seconds."""

    def __init__(
        self, lines: LogWriter | None, tracing: Tracing | None, worker: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lines = lines
        self._tracing = tracing
        self._worker = worker
        self._clock = clock
        self._under_way: dict[int, _Work] = {}

    def begin(self, request: Generate | Question) -> None:
        """A request has come."""
        operation = _operation_of(request)
        work = _Work(request.request_id, operation, request.model, self._clock())
        if self._tracing is not None:
            work.span = self._tracing.begin(f"{operation} {request.model}", request.trace)
        self._under_way[request.request] = work

    def take(self, piece: Piece) -> None:
        """The next piece of its answer; the last one ends it."""
        work = self._under_way[piece.request]
        work.tokens += piece.tokens
        work.prompt_tokens = piece.prompt_tokens or work.prompt_tokens
        if work.first_s is None and (piece.text or piece.tool_calls):
            work.first_s = self._clock() - work.began_s
            if work.span is not None:
                work.span.note_first_text()
        if piece.end is not None:
            del self._under_way[piece.request]
            self._end(work, piece.end if piece.failure is None else piece.failure.kind)

    def close(self) -> None:
        """Nothing more will come of those that are under way."""
        for work in self._under_way.values():
            self._end(work, _LOST)
        self._under_way.clear()

    def _end(self, work: _Work, end: str) -> None:
        line = WorkLine(
            request_id=work.request_id,
            model=work.model,
            seconds=round(self._clock() - work.began_s, 6),
            first_text_seconds=None if work.first_s is None else round(work.first_s, 6),
            prompt_tokens=work.prompt_tokens,
            completion_tokens=work.tokens,
            end=end,
        )
        if work.span is not None:
            self._end_span(work.span, work.operation, line)
        if self._lines is not None:
            self._lines.tell(logging.WARNING if end in _BAD_ENDS else logging.INFO, "request", line)

    def _end_span(self, span: RequestSpan, operation: str, line: WorkLine) -> None:
        is_answer = line.end not in _UNFINISHED
        answer = describe_answer(
            operation,
            asked_model=line.model,
            model=line.model,
            prompt_tokens=line.prompt_tokens,
            completion_tokens=line.completion_tokens,
            first_text_s=line.first_text_seconds,
            finish_reason=line.end if is_answer else None,
        )
        more = {
            "error.type": None if is_answer else line.end,
            "chaccu.request_id": line.request_id,
            "chaccu.worker": self._worker,
        }
        span.end(f"{operation} {line.model}", answer | more, line.end if line.end in _BAD_ENDS else None)


def open_work_log(lines: LogWriter | None, tracing: Tracing | None, worker: str) -> WorkLog | None:
    """The log of one connection; None where nobody wants to know."""
    return None if lines is None and tracing is None else WorkLog(lines, tracing, worker)


def _operation_of(request: Generate | Question) -> str:
    """What is asked for, as the conventions for generative AI call it where they do."""
    if isinstance(request, Generate):
        return "text_completion" if request.conversation is None else "chat"
    return {Tokenize: "tokenize", Detokenize: "detokenize", Embed: "embeddings"}[type(request)]
