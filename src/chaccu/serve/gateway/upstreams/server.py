"""`UpstreamServer`: one upstream, with its connections, its counts, and whether it is used now.

Invariants: connections are kept and used again, each for one request at a time; an upstream that failed is left out until it
answers a probe; neither its API key nor a login in its URL is ever shown. It ignores what the bytes mean.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from base64 import b64encode
from collections.abc import Callable
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

import msgspec

from chaccu.errors import UsageError
from chaccu.serve.gateway.config import Upstream
from chaccu.serve.gateway.upstreams.connection import ResponseHead, UpstreamConnection
from chaccu.serve.gateway.upstreams.routing import UpstreamBreaker, UpstreamLoad

_CONNECT_TIMEOUT_S = 3.0
_PROBE_TIMEOUT_S = 2.0
# Servers and the boxes between close idle connections without a word after a minute or so.
_IDLE_S = 30.0
_MAX_IDLE = 1024
# Seconds of silence before the first question to the other side's system, seconds between two, questions in vain; and
# milliseconds that what was sent may stay unconfirmed. Not every system has all of them.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
# Any lower status comes from a server that is there, though it may not know the probe's path.
_FIRST_FAILURE_STATUS = 500
_log = logging.getLogger(__name__)
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class UpstreamStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One upstream of a model, for people and scripts.

    `requests`: what it was given; `failures`: those that it did not answer; `continued`: answers of others that it went on
    with; `since_s`: seconds in this state.
    """

    model: str
    upstream: str
    state: Literal["ready", "failed"]
    weight: float
    priority: int
    outstanding: int
    requests: int
    failures: int
    continued: int
    since_s: float


class UpstreamServer:
    """`clock` gives seconds; `on_ready` is called when it is used again after a failure."""

    def __init__(self, upstream: Upstream, clock: Callable[[], float], on_ready: Callable[[], None]) -> None:
        """Raises `UsageError` when its API key is not in the environment."""
        parts = urlsplit(upstream.url)
        tls = parts.scheme == "https"
        self.continues = upstream.continues
        self._upstream = upstream
        self._host, self._port = parts.hostname or "", parts.port or (443 if tls else 80)
        self._context = ssl.create_default_context() if tls else None
        shown_host = f"[{self._host}]" if ":" in self._host else self._host.encode("idna").decode("ascii")
        self.shown_url = f"{parts.scheme}://{shown_host}:{self._port}{parts.path}"
        headers = [f"host: {shown_host}:{self._port}", "content-type: application/json", "accept-encoding: identity"]
        if upstream.key_env:
            headers.append(f"authorization: Bearer {_key_of(upstream)}")
        elif parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers.append(f"authorization: Basic {b64encode(login.encode()).decode('ascii')}")
        self._path = quote(parts.path.rstrip("/"), safe="/%").encode("ascii")
        self._headers = "".join(f"{header}\r\n" for header in headers).encode("ascii")
        self._remote_model = msgspec.Raw(msgspec.json.encode(upstream.remote_model)) if upstream.remote_model else None
        self._clock = clock
        self._on_ready = on_ready
        # In the order in which they became idle.
        self._idle: dict[UpstreamConnection, None] = {}
        self._breaker = UpstreamBreaker(clock)
        self._recovering: asyncio.Task[None] | None = None
        self._outstanding = self._requests = self._failures = self._continued = 0
        self._last_given_s = 0.0

    # Requests, as routing and people see them.

    @property
    def is_left_out(self) -> bool:
        """Whether it failed, and has not answered a probe since."""
        return self._breaker.is_left_out

    def load(self, *, has_failed: bool) -> UpstreamLoad:
        """What routing has to know."""
        return UpstreamLoad(
            outstanding=self._outstanding,
            last_given_s=self._last_given_s,
            weight=self._upstream.weight,
            priority=self._upstream.priority,
            is_left_out=self.is_left_out,
            has_failed=has_failed,
        )

    def status(self) -> UpstreamStatus:
        """What people are shown."""
        return UpstreamStatus(
            model=self._upstream.name,
            upstream=self.shown_url,
            state="failed" if self.is_left_out else "ready",
            weight=self._upstream.weight,
            priority=self._upstream.priority,
            outstanding=self._outstanding,
            requests=self._requests,
            failures=self._failures,
            continued=self._continued,
            since_s=round(self._clock() - self._breaker.since_s, 1),
        )

    def take_on(self) -> None:
        """It gets a request; `let_go` follows."""
        self._outstanding += 1
        self._requests += 1
        self._last_given_s = self._clock()

    def let_go(self) -> None:
        """It has the request no more."""
        self._outstanding -= 1

    def succeed(self, *, continued: bool = False) -> None:
        """It answers; `continued`: goes on with another one's answer."""
        self._breaker.succeed()
        self._continued += continued

    def fail(self, why: str) -> None:
        """It did not answer, or not to the end: leave it out until it does."""
        self._failures += 1
        if self._breaker.fail():
            _log.warning("the upstream %s of %r is left out: %s", self.shown_url, self._upstream.name, why)
            self._recovering = asyncio.ensure_future(self._recover())

    # Bytes and connections.

    def write_request(self, endpoint: str, body: bytes, headers: bytes) -> bytes:
        """The request as it is sent, with the lines `headers` among its own, naming the model as this upstream does."""
        if self._remote_model is not None:
            body = msgspec.json.encode({**_decode_fields(body), "model": self._remote_model})
        target = b"%b/%b" % (self._path, endpoint.encode("ascii"))
        head = b"POST %b HTTP/1.1\r\n%b%b" % (target, self._headers, headers)
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
            transport, connection = await asyncio.get_running_loop().create_connection(
                lambda: UpstreamConnection(self._keep, self._forget), self._host, self._port, ssl=self._context
            )
        _end_when_unreachable(transport.get_extra_info("socket"))
        return connection

    def close(self) -> None:
        """Close the connections that no request has."""
        if self._recovering is not None:
            self._recovering.cancel()
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

    # Coming back.

    async def _recover(self) -> None:
        while self._breaker.is_left_out:
            await asyncio.sleep(self._breaker.probe_in_s)
            self._breaker.end_probe(await self.answers())
        self._recovering = None
        _log.warning("the upstream %s of %r is used again", self.shown_url, self._upstream.name)
        self._on_ready()

    async def answers(self) -> bool:
        """Whether it answers the cheapest request."""
        probe = _Probe()
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                connection = await self.connect()
                try:
                    connection.send(b"GET %b/models HTTP/1.1\r\n%b\r\n" % (self._path, self._headers), probe)
                    await probe.ended.wait()
                finally:
                    if not probe.ended.is_set():
                        connection.abort()
        except (OSError, TimeoutError, UnicodeError):
            return False
        return probe.is_answered


class _Probe:
    """The receiver of a probe's response."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.is_answered = False
        self._status = _FIRST_FAILURE_STATUS

    def begin(self, head: ResponseHead) -> None:
        self._status = head.status

    def deliver(self, body: bytes) -> None:
        pass

    def finish(self, body: bytes) -> None:
        self.is_answered = self._status < _FIRST_FAILURE_STATUS
        self.ended.set()

    def fail(self, *, began: bool) -> None:
        self.ended.set()


def _end_when_unreachable(connected: socket.socket) -> None:
    """Have the system end a connection whose other side is gone without a word: a host that lost its power or its network."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _key_of(upstream: Upstream) -> str:
    key = os.environ.get(upstream.key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UsageError(
            f"the environment variable {upstream.key_env!r} holds no API key for the upstream {upstream.name!r}.",
            remedy=f"export {upstream.key_env}=… before the gateway starts",
        )
    return key
