"""`Front`: a client's connection. Requests for upstreams are relayed from here, all others go on to the app.

uvicorn's protocol reads HTTP and runs the app; this one looks at each request first. A well-formed POST to one of two paths
whose body is checked and whose model is an upstream's takes the fast path: one parse of the head, one of the body, bytes from
socket to socket. Whatever else comes, wrong requests too, is handed to uvicorn's part unchanged, so each answer and each error
has one place.

Invariants: a client that leaves stops the upstream at once; a slow client stops the reading of its own upstream only; a client
that takes too long over a head or a body, or reads nothing of its answer, is let go. It ignores workers and what the bytes
mean.
"""

from __future__ import annotations

import asyncio
import http
from collections.abc import Sequence
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from chaccu.serve.gateway.access.aliases import Aliases
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.dialects.dialects import write_error
from chaccu.serve.gateway.dialects.relayed_request import RelayedChat, RelayedCompletion
from chaccu.serve.gateway.drain import Drain
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.http.admission import Admission, estimate_tokens
from chaccu.serve.gateway.http.client_limits import ClientLimits, Debt
from chaccu.serve.gateway.http.fast_answer import FastAnswer
from chaccu.serve.gateway.http.request_note import Observer
from chaccu.serve.gateway.records.conversation_log import ConversationLog
from chaccu.serve.gateway.records.relayed_answer import RelayedAnswer
from chaccu.serve.gateway.upstreams.upstream import UpstreamRelay

_CHAT, _COMPLETIONS = "chat/completions", "completions"
_PATHS = {f"/v1/{endpoint}".encode(): endpoint for endpoint in (_CHAT, _COMPLETIONS)}
_DECODE = {
    _CHAT: msgspec.json.Decoder(RelayedChat).decode,
    _COMPLETIONS: msgspec.json.Decoder(RelayedCompletion).decode,
}
_SHOWN_PATHS = {endpoint: path.decode() for path, endpoint in _PATHS.items()}
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


class FastRelay(msgspec.Struct, frozen=True):
    """What the fast path needs of a gateway."""

    config: GatewayConfig
    admission: Admission
    aliases: Aliases
    upstreams: UpstreamRelay
    observer: Observer
    log: ConversationLog | None
    drain: Drain


class Front(HttpToolsProtocol):
    """One client's connection; uvicorn makes it, with the gateway's `relay` before its own arguments."""

    def __init__(self, relay: FastRelay, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._relay = relay
        self.url = b""
        self._endpoint: str | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._answer: FastAnswer | None = None
        self._keeps_alive = True
        self._ignores = False
        self._limits = ClientLimits(relay.config, self.loop.time())

    # What the event loop calls.

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            # Requests in a pipeline are not answered: the connection closes after this answer, and the client asks again.
            self._keeps_alive = False
            return
        if self._limits.owes is None and (self.cycle is None or self.cycle.response_complete):
            self._owe("head")
        super().data_received(data)
        if self._limits.owes == "head" and (wrong := self._limits.count_head(len(data))) is not None:
            self._turn_away(wrong)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        observer, limit = self._relay.observer, self._relay.config.max_connections
        observer.connections += 1
        super().connection_made(transport)
        if observer.connections > limit:
            message = f"the gateway has {limit:,} connections open, its limit."
            self._turn_away(ApiError(503, message, kind="service_unavailable", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._relay.observer.connections -= 1
        answer, self._answer = self._answer, None
        self._limits.owes = None
        if answer is not None:
            answer.leave()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        # It is a worker's from here on, and ends as such.
        self._relay.observer.connections -= 1
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limits.keep_reading()
        if self._answer is not None and self._answer.exchange is not None:
            self._answer.exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer is not None and self._answer.exchange is not None:
            self._answer.exchange.resume()

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way: its head has come, and its answer has not left."""
        return not (self._answer is None and self._endpoint is None and (self.cycle is None or self.cycle.response_complete))

    def shutdown(self) -> None:
        """The server ends: close after the present answer."""
        if self._answer is None and self._endpoint is None:
            super().shutdown()
        else:
            self._keeps_alive = False

    def abandon(self) -> None:
        """The server has ended, and the present answer has not."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.leave()
            self.transport.abort()

    def check_time(self, now_s: float) -> None:
        """Let the client go if it has taken too long."""
        limits = self._limits
        if self.flow.write_paused and limits.has_not_read(now_s, self.transport.get_write_buffer_size()):
            # It would keep its turn at the workers, and others from theirs.
            self.transport.abort()
            return
        if self._answer is not None and (late := limits.late(now_s)) is not None:
            self._answer.break_off(late)
        if not limits.is_overdue(now_s):
            return
        if limits.owes != "request" and (self.cycle is None or not self.cycle.response_started or self.cycle.response_complete):
            self._turn_away(limits.slow())
        limits.owes = None
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._turn_away(ApiError(400, "this is no HTTP request.", kind="invalid_request_error", code="invalid_http"))

    def _turn_away(self, error: ApiError) -> None:
        """Answer what has not come whole, and close the connection."""
        self._ignores = True
        self._limits.owes = None
        path = self.url.partition(b"?")[0].decode("latin-1")
        method = self.scope.get("method", "") if self.scope else ""
        note = self._relay.observer.begin(self.headers or (), method, path)
        note.fail(error)
        body = write_error(path, error)
        self.transport.write(self.write_whole(error.status, body, keep_alive=False, more=note.headers))
        note.close(error.status)
        self.transport.close()

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._answer is not None:
            self._ignores, self._keeps_alive = True, False
            return
        if self._limits.owes == "request":
            self._owe("head")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._ignores:
            return
        if (wrong := self._limits.count_lines(len(self.headers))) is not None:
            self._turn_away(wrong)
            return
        endpoint = _PATHS.get(self.url)
        if (
            endpoint is None
            or self.expect_100_continue
            or self.parser.get_method() != b"POST"
            or self.parser.get_http_version() != "1.1"
            or self.parser.should_upgrade()
            or not (self.cycle is None or self.cycle.response_complete)
        ):
            super().on_headers_complete()
        else:
            self._endpoint = endpoint
            self._keeps_alive = self.parser.should_keep_alive()
        self._owe("body")

    def on_body(self, body: bytes) -> None:
        if self._ignores:
            return
        if self._endpoint is None:
            super().on_body(body)
            return
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > self._relay.config.max_body_bytes:
            self._hand_over()

    def on_message_complete(self) -> None:
        if self._ignores:
            return
        self._limits.owes = None
        if self._endpoint is not None:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            if self._take_on(self._endpoint, body):
                self._forget_request()
                return
            self._hand_over()
        super().on_message_complete()

    # The fast path.

    def _take_on(self, endpoint: str, body: bytes) -> bool:
        """Relay the request, if it is right and for an upstream."""
        relay = self._relay
        if relay.drain.has_begun:
            return False
        is_logged = relay.log is not None and endpoint == _CHAT
        try:
            request = _DECODE[endpoint](body)
            if is_logged:
                # The checks above skip over what they do not know; the log reads all of it.
                msgspec.json.decode(body)
            key = relay.admission.identify(self.headers)
            relay.admission.check_model(key, request.model)
        except (msgspec.DecodeError, UnicodeDecodeError, ApiError):
            return False
        # An alias may stand for several models, and the body has to name the one that is chosen.
        if not relay.upstreams.serves(request.model) or request.model in relay.aliases:
            return False
        tokens = estimate_tokens(len(body), None)
        if not relay.admission.decides_now(key, tokens):
            # Limits that gateways share have to be asked for, which takes a moment.
            return False
        note = relay.observer.begin(self.headers, "POST", _SHOWN_PATHS[endpoint])
        note.relay(request.model)
        note.key_id = None if key is None else key.id
        try:
            admitted = relay.admission.admit(key, request.model, tokens)
        except ApiError as error:
            # Counted by now, so it is told from here.
            note.fail(error)
            note.close(error.status)
            more = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in error.headers.items()]
            more += note.headers
            self.transport.write(self.write_whole(error.status, error.to_json(), keep_alive=self._keeps_alive, more=more))
            self.end_answer()
            return True
        logged = RelayedAnswer(request.model, body) if is_logged else None
        answer = self._answer = FastAnswer(self, relay.log, admitted, logged, note)
        answer.exchange = relay.upstreams.start(request.model, endpoint, body, answer, note.passed_on, note.try_upstream)
        if self.flow.write_paused:
            answer.exchange.pause()
        return True

    def _hand_over(self) -> None:
        """Give what has come of the request to uvicorn's part."""
        body = b"".join(self._body)
        self._forget_request()
        super().on_headers_complete()
        super().on_body(body)

    def _forget_request(self) -> None:
        self._endpoint = None
        self._body = []
        self._body_bytes = 0

    def _owe(self, what: Debt) -> None:
        self._limits.owe(what, self.loop.time())

    # What the answer calls.

    @property
    def keeps_alive(self) -> bool:
        return self._keeps_alive

    def write_head(
        self, status: int, headers: list[tuple[bytes, bytes]], length_bytes: int | None, *, keep_alive: bool
    ) -> bytes:
        """The head of a response; chunks follow where there is no length."""
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        lines += [b"%b: %b\r\n" % pair for pair in (*self.server_state.default_headers, *headers)]
        lines.append(b"transfer-encoding: chunked\r\n" if length_bytes is None else b"content-length: %d\r\n" % length_bytes)
        lines.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
        return b"".join(lines)

    def write_whole(self, status: int, body: bytes, *, keep_alive: bool, more: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
        """A whole response that holds JSON, with `more` headers."""
        headers = [(b"content-type", b"application/json"), *more]
        return self.write_head(status, headers, len(body), keep_alive=keep_alive) + body

    def end_answer(self) -> None:
        """The answer is complete: the client's next request may come."""
        self._answer = None
        self.server_state.total_requests += 1
        if self._keeps_alive:
            self._owe("request")
        else:
            self.transport.close()

    def break_answer(self) -> None:
        """The answer will not be complete: the end of the connection says so."""
        self._answer = None
        self.transport.abort()
