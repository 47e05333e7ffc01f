"""`send_relayed`: an upstream's response through ASGI, for the requests that do not take the fast path.

Invariant: what waits for a slow client is bounded, as the upstream is not read meanwhile. It ignores what the bytes mean.
"""

from __future__ import annotations

import asyncio

from starlette.types import Send

from chaccu.serve.gateway.access.limits import HeaderPairs
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.http.passing_body import PassingBody
from chaccu.serve.gateway.http.request_note import RequestNote
from chaccu.serve.gateway.http.until_disconnect import NOT_BUFFERED, send_piece
from chaccu.serve.gateway.records.relayed_answer import RelayedAnswer
from chaccu.serve.gateway.upstreams.connection import ResponseHead
from chaccu.serve.gateway.upstreams.exchange import Exchange
from chaccu.serve.gateway.upstreams.upstream import UpstreamRelay

_MAX_WAITING_BYTES = 256 * 1024


class _Waiting:
    """What has come of a response and is not sent yet."""

    def __init__(self) -> None:
        self.exchange: Exchange | None = None
        self.head: ResponseHead | None = None
        self.ended = False
        self.lost: ApiError | None = None
        self._changed = asyncio.Event()
        self._bodies: list[bytes] = []
        self._size = 0

    def begin(self, head: ResponseHead) -> None:
        self.head = head

    def deliver(self, body: bytes) -> None:
        self._bodies.append(body)
        self._size += len(body)
        if self._size > _MAX_WAITING_BYTES and self.exchange is not None:
            self.exchange.pause()
        self._changed.set()

    def finish(self, body: bytes) -> None:
        self.ended = True
        self.deliver(body)

    def fail(self, lost: ApiError) -> None:
        self.lost = lost
        self._changed.set()

    async def take(self) -> bytes:
        """All that has come since the last call; waits for something."""
        await self._changed.wait()
        self._changed.clear()
        body = b"".join(self._bodies)
        self._bodies.clear()
        self._size = 0
        if self.exchange is not None:
            self.exchange.resume()
        return body


async def send_relayed(
    upstreams: UpstreamRelay,
    model: str,
    endpoint: str,
    body: bytes,
    send: Send,
    logged: RelayedAnswer | None,
    more: HeaderPairs,
    note: RequestNote,
) -> int:
    """Pass a request to an upstream of `model` and its response to `send` (and `logged`); returns the response's status.

    `more` headers go beside the upstream's own.

    Raises `ApiError` when the upstream cannot be reached.
    """
    waiting = _Waiting()
    exchange = waiting.exchange = upstreams.start(model, endpoint, body, waiting, note.passed_on, note.try_upstream)
    try:
        return await _send(waiting, send, logged, more, note)
    finally:
        exchange.cancel()


async def _send(waiting: _Waiting, send: Send, logged: RelayedAnswer | None, more: HeaderPairs, note: RequestNote) -> int:
    piece = await waiting.take()
    head = waiting.head
    if head is None:
        assert waiting.lost is not None
        raise waiting.lost
    body = PassingBody(head, logged)
    headers = [*head.headers, *more, *NOT_BUFFERED]
    if head.length_bytes is not None:
        headers.append((b"content-length", b"%d" % head.length_bytes))
    await send({"type": "http.response.start", "status": head.status, "headers": headers})
    note.note_text()
    while True:
        body.take(piece)
        if waiting.lost is not None:
            break
        if waiting.ended:
            body.finish()
            await send_piece(send, piece, last=True)
            return head.status
        await send_piece(send, piece)
        piece = await waiting.take()
    note.fail(waiting.lost)
    note.status = waiting.lost.status
    said = body.break_off(waiting.lost)
    if said is not None:
        await send_piece(send, piece + said, last=True)
    # Any other response stays without its end, and the server closes the connection: that says it best.
    return waiting.lost.status
