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

from chaccu.serve.gateway.admission import Admission, Admitted, estimate_tokens
from chaccu.serve.gateway.aliases import Aliases
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.conversation_log import ConversationLog
from chaccu.serve.gateway.dialects import write_error
from chaccu.serve.gateway.errors import CLIENT_LEFT, ApiError
from chaccu.serve.gateway.passing_body import PassingBody
from chaccu.serve.gateway.relayed_answer import RelayedAnswer
from chaccu.serve.gateway.relayed_request import RelayedChat, RelayedCompletion
from chaccu.serve.gateway.request_note import Observer, RequestNote
from chaccu.serve.gateway.until_disconnect import NOT_BUFFERED
from chaccu.serve.gateway.upstream import UpstreamRelay
from chaccu.serve.gateway.upstream_connection import ResponseHead
from chaccu.serve.gateway.upstream_exchange import Exchange

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


class Front(HttpToolsProtocol):
    """One client's connection; uvicorn makes it, with the gateway's `relay` before its own arguments."""

    def __init__(self, relay: FastRelay, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._relay = relay
        self._endpoint: str | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._answer: _FastAnswer | None = None
        self._keeps_alive = True
        self._ignores = False
        # What the client owes, and since when: a head, a body, or the next request (None: nothing).
        self._owes: str | None = "request"
        self._since_s = self.loop.time()
        # How much of an answer waits for the client to read, and since when none of it went.
        self._unread_bytes: int | None = None
        self._unread_since_s = 0.0

    # What the event loop calls.

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            # Requests in a pipeline are not answered: the connection closes after this answer, and the client asks again.
            self._keeps_alive = False
            return
        if self._owes is None and (self.cycle is None or self.cycle.response_complete):
            self._owe("head")
        super().data_received(data)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._relay.observer.connections += 1
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._relay.observer.connections -= 1
        answer, self._answer = self._answer, None
        self._owes = None
        if answer is not None:
            answer.leave()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        # It is a worker's from here on, and ends as such.
        self._relay.observer.connections -= 1
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_bytes = None
        if self._answer is not None and self._answer.exchange is not None:
            self._answer.exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer is not None and self._answer.exchange is not None:
            self._answer.exchange.resume()

    def shutdown(self) -> None:
        """The server ends: close after the present answer."""
        if self._answer is None:
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
        config = self._relay.config
        if self.flow.write_paused and self._has_not_read(now_s, config.unread_timeout_s):
            # It would keep its turn at the workers, and others from theirs.
            self.transport.abort()
            return
        limits_s = {"request": config.keep_alive_s, "head": config.head_timeout_s, "body": config.body_timeout_s}
        if self._owes is None or now_s - self._since_s < limits_s[self._owes]:
            return
        if self._owes != "request" and (self.cycle is None or not self.cycle.response_started or self.cycle.response_complete):
            message = f"the request's {self._owes} was not complete after {limits_s[self._owes]:g} s, the limit."
            slow = ApiError(408, message, kind="invalid_request_error", code="request_timeout")
            self._refuse(slow)
        self._owes = None
        self.transport.close()

    def _has_not_read(self, now_s: float, limit_s: float) -> bool:
        unread_bytes = self.transport.get_write_buffer_size()
        if unread_bytes != self._unread_bytes:
            self._unread_bytes, self._unread_since_s = unread_bytes, now_s
        return now_s - self._unread_since_s >= limit_s

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(ApiError(400, "this is no HTTP request.", kind="invalid_request_error", code="invalid_http"))
        self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer a request that has not come whole, before the connection closes."""
        path = (self.url or b"").partition(b"?")[0].decode("latin-1")
        method = self.scope.get("method", "") if self.scope else ""
        note = self._relay.observer.begin(self.headers or (), method, path)
        note.fail(error)
        body = write_error(path, error)
        self.transport.write(self.write_whole(error.status, body, keep_alive=False, more=note.headers))
        note.close(error.status)

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._answer is not None:
            self._ignores, self._keeps_alive = True, False
            return
        if self._owes == "request":
            self._owe("head")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._ignores:
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
        self._owes = None
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
        note = relay.observer.begin(self.headers, "POST", _SHOWN_PATHS[endpoint])
        note.relay(request.model)
        note.key_id = None if key is None else key.id
        try:
            admitted = relay.admission.admit(key, request.model, estimate_tokens(len(body), None))
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
        answer = self._answer = _FastAnswer(self, relay, request.model, admitted, logged, note)
        answer.exchange = relay.upstreams.start(request.model, endpoint, body, answer, note.raw_id)
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

    def _owe(self, what: str) -> None:
        self._owes = what
        self._since_s = self.loop.time()

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


class _FastAnswer:
    """One answer on the fast path, as the receiver of the upstream's response."""

    def __init__(
        self,
        front: Front,
        relay: FastRelay,
        model: str,
        admitted: Admitted,
        logged: RelayedAnswer | None,
        note: RequestNote,
    ) -> None:
        self.exchange: Exchange | None = None
        self._front = front
        self._relay = relay
        self._model = model
        self._logged = logged
        self._admitted = admitted
        self._note = note
        self._head: ResponseHead | None = None
        self._unsent = b""
        self._chunked = True
        self._passing: PassingBody | None = None
        # Whether the next piece is looked at: the first one is noted, and all are where they are logged.
        self._looks = True

    def begin(self, head: ResponseHead) -> None:
        self._head = head
        self._chunked = head.length_bytes is None
        self._passing = PassingBody(head, self._logged)
        front = self._front
        headers = [*head.headers, *self._admitted.headers, *self._note.headers, *NOT_BUFFERED]
        # It leaves with the first bytes of the body.
        self._unsent = front.write_head(head.status, headers, head.length_bytes, keep_alive=front.keeps_alive)

    def deliver(self, body: bytes) -> None:
        if body and self._looks:
            self._take(body)
        self._front.transport.write(self._encode(body))

    def finish(self, body: bytes) -> None:
        assert self._passing is not None
        if body and self._looks:
            self._take(body)
        self._passing.finish()
        data = self._encode(body)
        self._front.transport.write(data + b"0\r\n\r\n" if self._chunked else data)
        assert self._head is not None
        self._end(self._head.status)
        self._front.end_answer()

    def fail(self, lost: ApiError) -> None:
        front = self._front
        said = self._passing.break_off(lost) if self._passing is not None else None
        self._note.fail(lost)
        self._end(lost.status)
        if self._passing is None:
            more = [*self._admitted.headers, *self._note.headers]
            front.transport.write(front.write_whole(lost.status, lost.to_json(), keep_alive=front.keeps_alive, more=more))
            front.end_answer()
        elif said is not None:
            front.transport.write(self._encode(said) + b"0\r\n\r\n")
            front.end_answer()
        else:
            front.break_answer()

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        if self.exchange is not None:
            self.exchange.cancel()
        self._end(CLIENT_LEFT)

    def _take(self, body: bytes) -> None:
        """Note and keep what has come."""
        self._note.note_text()
        self._looks = self._logged is not None
        assert self._passing is not None
        self._passing.take(body)

    def _encode(self, body: bytes) -> bytes:
        unsent, self._unsent = self._unsent, b""
        if not body:
            return unsent
        return b"%b%x\r\n%b\r\n" % (unsent, len(body), body) if self._chunked else unsent + body

    def _end(self, status: int) -> None:
        # Freed at once, not by the next collection.
        self.exchange = None
        self._admitted.close(status)
        self._note.close(status)
        if self._relay.log is not None and self._logged is not None:
            self._relay.log.add(self._logged)
