"""`UpstreamRelay`: models that an OpenAI-compatible server beside the gateway serves.

Invariants: bodies pass as they come, in both directions; connections are kept and used again, each for one request at a time;
a kept one that turns out to be closed before it answered is replaced once; when the client leaves, the connection to the
upstream is closed at once, which is how such servers learn to stop. It ignores what the bytes mean.
"""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Callable
from urllib.parse import quote, unquote, urlsplit

from chaccu.serve.gateway.config import Upstream
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.upstream_connection import Receiver, ResponseHead, UpstreamConnection

_CONNECT_TIMEOUT_S = 5.0
# Servers and the boxes between close idle connections without a word after a minute or so.
_IDLE_S = 30.0
_MAX_IDLE = 1024


class Exchange:
    """One request to an upstream and its response; made by `UpstreamRelay.start`."""

    def __init__(self, pool: _Pool, request: bytes, receiver: Receiver) -> None:
        self._pool = pool
        self._request = request
        self._receiver = receiver
        self._connection: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._paused = False
        self._replaced = False

    def start(self) -> None:
        connection = self._pool.take()
        if connection is None:
            self._connect()
        else:
            self._use(connection)

    def cancel(self) -> None:
        """Nobody waits for the response: the upstream learns it at once, the receiver hears nothing more."""
        self._pool.open.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abort()

    def pause(self) -> None:
        """The client does not keep up."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """The client has caught up."""
        self._paused = False
        if self._connection is not None:
            self._connection.resume()

    # As the connection's receiver.

    def begin(self, head: ResponseHead) -> None:
        self._receiver.begin(head)

    def deliver(self, body: bytes) -> None:
        self._receiver.deliver(body)

    def finish(self, body: bytes) -> None:
        self._pool.open.discard(self)
        self._connection = None
        self._receiver.finish(body)

    def fail(self, *, began: bool) -> None:
        kept = self._connection is not None and self._connection.answered > 0
        self._connection = None
        if kept and not began and not self._replaced:
            # Most likely the upstream closed an idle connection while the request was on its way.
            self._replaced = True
            self._connect()
            return
        self._pool.open.discard(self)
        self._receiver.fail(began=began)

    def _use(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        connection.send(self._request, self)
        if self._paused:
            connection.pause()

    def _connect(self) -> None:
        self._connecting = asyncio.ensure_future(self._connect_and_use())

    async def _connect_and_use(self) -> None:
        try:
            connection = await self._pool.connect()
        except (OSError, TimeoutError, UnicodeError):
            self.fail(began=False)
            return
        finally:
            self._connecting = None
        self._use(connection)


class _Pool:
    """The connections to one upstream; the one used last is used next."""

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        parts = urlsplit(url)
        self.open: set[Exchange] = set()
        tls = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if tls else 80)
        self._context = ssl.create_default_context() if tls else None
        shown_host = f"[{self._host}]" if ":" in self._host else self._host.encode("idna").decode("ascii")
        headers = [f"host: {shown_host}:{self._port}", "content-type: application/json", "accept-encoding: identity"]
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers.append(f"authorization: Basic {b64encode(login.encode()).decode('ascii')}")
        self._path = quote(parts.path.rstrip("/"), safe="/%").encode("ascii")
        self._headers = "".join(f"{header}\r\n" for header in headers).encode("ascii")
        self._clock = clock
        # In the order in which they became idle.
        self._idle: dict[UpstreamConnection, None] = {}

    def write_request(self, endpoint: str, body: bytes, request_id: bytes) -> bytes:
        target = b"%b/%b" % (self._path, endpoint.encode("ascii"))
        head = b"POST %b HTTP/1.1\r\n%bx-request-id: %b\r\n" % (target, self._headers, request_id)
        return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)

    def take(self) -> UpstreamConnection | None:
        """A kept connection, if there is one."""
        if not self._idle:
            return None
        connection, _ = self._idle.popitem()
        if self._clock() - connection.idle_since_s < _IDLE_S:
            return connection
        # The others have been idle for longer still.
        connection.abort()
        self._close_idle()
        return None

    async def connect(self) -> UpstreamConnection:
        """A new connection. Raises `OSError`, `TimeoutError`, or `UnicodeError` for a host's name that is none."""
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            # asyncio and uvloop set TCP_NODELAY.
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: UpstreamConnection(self._keep, self._forget), self._host, self._port, ssl=self._context
            )
        return connection

    def close(self) -> None:
        for exchange in list(self.open):
            exchange.cancel()
        self._close_idle()

    def _keep(self, connection: UpstreamConnection) -> None:
        if len(self._idle) >= _MAX_IDLE:
            connection.abort()
            return
        connection.idle_since_s = self._clock()
        self._idle[connection] = None

    def _forget(self, connection: UpstreamConnection) -> None:
        self._idle.pop(connection, None)

    def _close_idle(self) -> None:
        idle, self._idle = self._idle, {}
        for connection in idle:
            connection.abort()


class UpstreamRelay:
    """Relays requests to `upstreams` by model name; `clock` gives seconds."""

    def __init__(self, upstreams: tuple[Upstream, ...], clock: Callable[[], float]) -> None:
        self._pools = {upstream.name: _Pool(upstream.url, clock) for upstream in upstreams}
        self.names = sorted(self._pools)

    def serves(self, model: str) -> bool:
        return model in self._pools

    def start(self, model: str, endpoint: str, body: bytes, receiver: Receiver, request_id: bytes) -> Exchange:
        """Send a request to the upstream of `model`, with its id; `receiver` gets the response, or hears that there is none."""
        pool = self._pools[model]
        exchange = Exchange(pool, pool.write_request(endpoint, body, request_id), receiver)
        pool.open.add(exchange)
        exchange.start()
        return exchange

    def close(self) -> None:
        """Break off what is under way, and close all connections."""
        for pool in self._pools.values():
            pool.close()


def upstream_error(model: str, *, began: bool) -> ApiError:
    """The upstream of `model` cannot be reached, or it broke off an answer it had begun."""
    return ApiError(
        502,
        f"the upstream of {model!r} {'broke off its answer' if began else 'is not reachable'}.",
        kind="service_unavailable",
        code="upstream_lost" if began else "upstream_unreachable",
        param="model",
    )
