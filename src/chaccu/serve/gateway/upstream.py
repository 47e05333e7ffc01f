"""`UpstreamRelay`: models that an OpenAI-compatible server beside the gateway serves.

Invariants: bytes pass as they come, in both directions; one session serves all requests; when the client leaves, the
connection to the upstream is closed, which is how such servers learn to stop. It ignores what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Iterable

import aiohttp
from starlette.types import Send

from chaccu.serve.gateway.config import Upstream
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.relayed_answer import RelayedAnswer
from chaccu.serve.gateway.responses import error_event
from chaccu.serve.gateway.until_disconnect import send_piece, send_start

_CONNECT_TIMEOUT_S = 5.0
_HEADERS = {"content-type": "application/json", "accept-encoding": "identity"}


class UpstreamRelay:
    """Relays requests to `upstreams` by model name; open between `open` and `close`."""

    def __init__(self, upstreams: tuple[Upstream, ...]) -> None:
        self._urls = {upstream.name: upstream.url for upstream in upstreams}
        self._session: aiohttp.ClientSession | None = None

    @property
    def names(self) -> list[str]:
        return sorted(self._urls)

    async def open(self) -> None:
        """Make the session, in the running event loop."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_TIMEOUT_S),
            auto_decompress=False,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def relay(
        self,
        model: str,
        endpoint: str,
        body: bytes,
        send: Send,
        logged: RelayedAnswer | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> int:
        """Pass a request to the upstream of `model` and its response to `send` (and `logged`); returns the response's status.

        `headers` go beside the upstream's own.

        Raises `ApiError` when the upstream cannot be reached.
        """
        if self._session is None:
            raise ApiError(503, "the gateway is starting.", kind="service_unavailable", code="starting")
        began = False
        try:
            async with self._session.post(f"{self._urls[model]}/{endpoint}", data=body, headers=_HEADERS) as response:
                content_type = response.headers.get("content-type", "application/json")
                if logged is not None:
                    logged.begin(response.status, content_type)
                await send_start(send, content_type.encode("latin-1"), status=response.status, more=headers)
                began = True
                async for piece in response.content.iter_any():
                    if logged is not None:
                        logged.take(piece)
                    await send_piece(send, piece)
        except (aiohttp.ClientError, TimeoutError) as error:
            lost = ApiError(
                502,
                f"the upstream of {model!r} {'broke off its answer' if began else 'is not reachable'}.",
                kind="service_unavailable",
                code="upstream_lost" if began else "upstream_unreachable",
                param="model",
            )
            if not began:
                raise lost from error
            if logged is not None:
                logged.broken_off = lost.code
            await send_piece(send, error_event(lost.to_json()), last=True)
            return lost.status
        if logged is not None:
            logged.broken_off = None
        await send_piece(send, b"", last=True)
        return response.status
