"""`UpstreamConnection`: one kept-alive HTTP/1.1 connection to an upstream, over a raw transport.

Invariants: one request at a time; the receiver hears `begin` once, then `deliver` any number of times, then `finish` or `fail`
once, and nothing after it let go; a connection that got anything it should not have is never used again. It ignores what
the bytes mean, and where connections come from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

import httptools
import msgspec

# Headers of a response that a client needs; the rest is between gateway and upstream, or said anew, as the request's id is.
_PASSED_ON = frozenset({b"content-type", b"content-encoding", b"retry-after"})
_FIRST_FINAL_STATUS = 200


class ResponseHead(msgspec.Struct):
    """The head of a response. `length_bytes` is None where the length is not known before the end; with `ends_by_close` that is
    the end of the connection, which a server that dies looks like."""

    status: int
    headers: list[tuple[bytes, bytes]]
    length_bytes: int | None
    ends_by_close: bool = False

    @property
    def content_type(self) -> str:
        return next((value.decode("latin-1") for name, value in self.headers if name == b"content-type"), "application/json")

    @property
    def is_event_stream(self) -> bool:
        return self.length_bytes is None and self.content_type.startswith("text/event-stream")

    @property
    def is_whole(self) -> bool:
        """Whether the body is one object, of no use before its end."""
        return self.length_bytes is not None or self.content_type.startswith("application/json")


class Receiver(Protocol):
    """Who gets a response."""

    def begin(self, head: ResponseHead) -> None:
        """The head has come."""
        ...

    def deliver(self, body: bytes) -> None:
        """The next bytes of the body, as far as they have come; none when only the head has."""
        ...

    def finish(self, body: bytes) -> None:
        """The last bytes of the body, and its end."""
        ...

    def fail(self, *, began: bool) -> None:
        """There will be no more; `began`: a head was given."""
        ...


class UpstreamConnection(asyncio.Protocol):
    """`on_free(connection)` is called when a request has ended well and the connection can take another one; `on_lost` when
    it has gone."""

    def __init__(self, on_free: Callable[[UpstreamConnection], None], on_lost: Callable[[UpstreamConnection], None]) -> None:
        self.idle_since_s = 0.0
        self.answered = 0
        self._on_free = on_free
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._paused = False
        self._reset()

    def _reset(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._head: ResponseHead | None = None
        self._began = False
        self._until_close = False
        self._keep_alive = False
        self._complete = False
        self._body: list[bytes] = []

    # What the owner does.

    def send(self, request: bytes, receiver: Receiver) -> None:
        """Send a whole request; `receiver` gets the response."""
        self._reset()
        self._receiver = receiver
        if self._transport is None:
            self._break_off()
        else:
            self._transport.write(request)

    def abort(self) -> None:
        """Close at once; the receiver hears nothing more."""
        self._receiver = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Read no more for now: the receiver's client is slow."""
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._receiver is None:
            # Nothing was asked for.
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._complete:
                self._break_off()
                return
            self._keep_alive = False
        self._pass_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self)
        if self._until_close and exc is None and self._head is not None:
            self._complete = True
            self._pass_on()
        elif self._receiver is not None:
            self._break_off()

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._complete:
            # A response that nobody asked for follows the one that somebody did.
            self._keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, []
        if self._complete or status < _FIRST_FINAL_STATUS:
            return
        length, chunked = None, False
        for name, value in headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                chunked = True
        self._keep_alive = self._parser.should_keep_alive()
        self._until_close = length is None and not chunked
        passed_on = [pair for pair in headers if pair[0] in _PASSED_ON]
        self._head = ResponseHead(status, passed_on, None if chunked else length, self._until_close)

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._head is not None:
            self._complete = True

    # Between the two.

    def _pass_on(self) -> None:
        """Give the receiver what the last bytes held: one call, however many chunks they were."""
        receiver, head = self._receiver, self._head
        if receiver is None or head is None:
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        if not self._began:
            self._began = True
            receiver.begin(head)
            if self._receiver is None:
                return
        if not self._complete:
            receiver.deliver(body)
            return
        self._receiver = None
        self.resume()
        self.answered += 1
        if self._keep_alive and self._transport is not None and not self._transport.is_closing():
            self._on_free(self)
        elif self._transport is not None:
            self._transport.close()
        receiver.finish(body)

    def _break_off(self) -> None:
        receiver, began = self._receiver, self._began
        self.abort()
        if receiver is not None:
            receiver.fail(began=began)
