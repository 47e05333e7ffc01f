"""`UntilDisconnect`: a response whose work ends when its client leaves.

Invariant: when the client disconnects, the work is cancelled at once, even while it waits for an engine's first token; what
the work raises before it has sent anything is turned into an error response by the app. It ignores what the work does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from starlette.types import Receive, Scope, Send

# Headers that have nothing between the gateway and a client hold pieces back.
NOT_BUFFERED = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


class UntilDisconnect:
    """An ASGI response: calls `work(send)`."""

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(send))
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_start(send: Send, content_type: bytes, *, status: int = 200, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Begin a response that is sent in pieces; `more` are further headers."""
    headers = [(b"content-type", content_type), *NOT_BUFFERED, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def send_piece(send: Send, body: bytes, *, last: bool = False) -> None:
    """Send a piece of the response's body."""
    await send({"type": "http.response.body", "body": body, "more_body": not last})
