"""`RequestNote`: what operators are told of one request, noted while it runs; `Observer` begins them.

Invariants: each request has one id, the client's own if it is short and printable, which every answer carries and every
upstream and worker gets; a note is closed once, and only then becomes counts and a line of the log. What it holds of a client
is its id, its path and a model that is known here: no header, key or word of the body. A note costs microseconds. It ignores
how requests are answered.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Callable, Sequence

from chaccu.serve.gateway.cors import CorsPolicy
from chaccu.serve.gateway.errors import CLIENT_LEFT, ApiError
from chaccu.serve.gateway.http.metrics import GatewayMetrics
from chaccu.serve.gateway.http.request_line import RequestLine
from chaccu.serve.gateway.http.request_span import begin_span, end_span, write_context
from chaccu.serve.link import TraceContext
from chaccu.serve.log_writer import LogWriter
from chaccu.serve.tracing import RequestSpan, Tracing

REQUEST_ID = b"x-request-id"

_is_good_id = re.compile(rb"[\x21-\x7e]{1,128}").fullmatch
_MAX_PATH_CHARS = 200
# Asked for by machines again and again.
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
_FIRST_ERROR, _FIRST_SERVER_ERROR = 400, 500


class Observer:
    """Begins the notes of one gateway's requests; `clock` gives seconds. Lines go to `log` and spans to `tracing`, if there
    are any; `cors` says what answers tell browsers."""

    def __init__(
        self,
        metrics: GatewayMetrics,
        log: LogWriter | None,
        cors: CorsPolicy,
        clock: Callable[[], float],
        tracing: Tracing | None = None,
    ) -> None:
        self.metrics = metrics
        self.log = log
        self.cors = cors
        self.tracing = tracing
        # How many requests upstreams have, by model.
        self.relayed: dict[str, int] = {}
        # Open connections of clients.
        self.connections = 0
        self.clock = clock
        self._made = f"req-{secrets.token_hex(6)}-".encode()
        self._numbers = itertools.count(1)

    def begin(self, headers: Sequence[tuple[bytes, bytes]], method: str, path: str) -> RequestNote:
        """The note of a request that has come, with lower-case names of `headers`."""
        request_id = origin = None
        for name, value in headers:
            if name == REQUEST_ID and _is_good_id(value):
                request_id = value
            elif name == b"origin":
                origin = value
        note = RequestNote(self, request_id or b"%b%x" % (self._made, next(self._numbers)), method, path)
        if self.cors.is_on:
            note.headers += self.cors.headers(origin)
        if self.tracing is not None and path not in _QUIET_PATHS:
            note.span = begin_span(self.tracing, headers, method)
        return note


class RequestNote:
    """One request. `headers` go with its answer. `model` is set once it is known that there is one of that name."""

    __slots__ = (
        "_began_s",
        "_first_s",
        "_has_failed",
        "_is_open",
        "_is_relayed",
        "_method",
        "_observer",
        "_path",
        "attempts",
        "end",
        "headers",
        "key_id",
        "model",
        "raw_id",
        "span",
        "status",
        "upstream",
        "usage",
        "worker",
    )

    def __init__(self, observer: Observer, raw_id: bytes, method: str, path: str) -> None:
        self.raw_id = raw_id
        self.headers = [(REQUEST_ID, raw_id)]
        self.key_id: str | None = None
        self.model: str | None = None
        self.upstream: str | None = None
        self.worker: str | None = None
        self.attempts = 0
        self.usage: tuple[int, int] | None = None
        self.end: str | None = None
        self.span: RequestSpan | None = None
        # 0 while no answer has begun.
        self.status = 0
        self._observer = observer
        self._method = method
        self._path = path
        self._began_s = observer.clock()
        self._first_s: float | None = None
        self._has_failed = False
        self._is_open = True
        self._is_relayed = False

    @property
    def id(self) -> str:
        return self.raw_id.decode("ascii")

    @property
    def trace(self) -> TraceContext | None:
        """Its span, as workers get it."""
        return None if self.span is None else self.span.context

    @property
    def passed_on(self) -> bytes:
        """Its id and its span, as upstreams get them: lines of a head."""
        line = b"x-request-id: %b\r\n" % self.raw_id
        return line if self.span is None else line + write_context(self.span.context)

    def try_worker(self, worker: str) -> None:
        """A worker was given the request, or what was left to answer of it."""
        self.worker = worker
        self.attempts += 1

    def note_text(self) -> None:
        """Some text of the answer has come."""
        if self._first_s is None:
            self._first_s = self._observer.clock() - self._began_s
            if self.model is not None:
                self._observer.metrics.time_first_text(self.model, self._first_s)
            if self.span is not None:
                self.span.note_first_text()

    def try_upstream(self, url: str) -> None:
        """An upstream was given the request, or what was left to answer of it."""
        self.upstream = url
        self.attempts += 1

    def relay(self, model: str) -> None:
        """The request is for the upstreams of `model`."""
        self.model = model
        self._is_relayed = True
        relayed = self._observer.relayed
        relayed[model] = relayed.get(model, 0) + 1

    def finish(self, prompt_tokens: int, completion_tokens: int, reason: str) -> None:
        """The answer is complete, and took so many tokens."""
        self.usage = prompt_tokens, completion_tokens
        self.end = reason
        if self.model is not None:
            self._observer.metrics.count_answer(self.model, reason, prompt_tokens, completion_tokens)

    def fail(self, error: ApiError) -> None:
        """There is an error instead of the answer, or of its rest."""
        self.end = error.code
        self._has_failed = True

    def close(self, status: int) -> None:
        """It has ended with this HTTP status (499: the client left); closing again changes nothing."""
        if not self._is_open:
            return
        self._is_open = False
        observer, seconds = self._observer, self._observer.clock() - self._began_s
        if status == CLIENT_LEFT:
            self.end = "client_left"
        if self.model is not None:
            observer.metrics.count_request(self.model, status, seconds)
            if self._is_relayed:
                observer.relayed[self.model] -= 1
            elif status == CLIENT_LEFT and self.worker is not None and self.usage is None:
                observer.metrics.count_answer(self.model, "abort")
        if self.span is not None:
            line, is_bad = self._line(status, seconds), self._is_bad(status)
            end_span(self.span, line, has_failed=is_bad or self._has_failed, is_bad=is_bad)
        if observer.log is not None:
            level = self._level(status)
            if level >= observer.log.level:
                observer.log.tell(level, "request", self._line(status, seconds))

    def _line(self, status: int, seconds: float) -> RequestLine:
        prompt_tokens, completion_tokens = self.usage or (None, None)
        return RequestLine(
            request_id=self.id,
            method=self._method,
            path=self._path[:_MAX_PATH_CHARS],
            status=status,
            seconds=round(seconds, 6),
            key=self.key_id,
            model=self.model,
            first_text_seconds=None if self._first_s is None else round(self._first_s, 6),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            worker=self.worker,
            upstream=self.upstream,
            attempts=self.attempts or None,
            end=self.end,
        )

    def _level(self, status: int) -> int:
        if self._path in _QUIET_PATHS:
            return logging.DEBUG
        return logging.WARNING if self._is_bad(status) else logging.INFO

    def _is_bad(self, status: int) -> bool:
        # A stream that broke off has had its status before.
        return status >= _FIRST_SERVER_ERROR or (self._has_failed and status < _FIRST_ERROR)
