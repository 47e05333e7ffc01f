"""`serve_gateway`: the app on a socket.

Invariants: the port is bound before anything is said to be ready; a busy port is one clear error; the port file appears whole
and only while the gateway listens; a conversation log is tried before anything listens, and closed after the last answer. Told
to end, it takes nothing new, lets what is under way be answered, and ends; told again, it ends.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn

from chaccu.artifact import atomic_file
from chaccu.errors import ServeError, explain_listening
from chaccu.serve.gateway.app import create_gateway
from chaccu.serve.gateway.config import GatewayConfig, check_config
from chaccu.serve.gateway.drain import Drain
from chaccu.serve.gateway.http.front import Front
from chaccu.serve.gateway.records.conversation_log import ConversationLog
from chaccu.serve.gateway.records.conversation_store import open_store
from chaccu.serve.link import MAX_FRAME_BYTES, PING_INTERVAL_S, PING_TIMEOUT_S
from chaccu.serve.log_writer import LogWriter
from chaccu.serve.tls import build_server_context
from chaccu.serve.tracing import Tracing

_BACKLOG = 2048
# For workers to hear of the end: by then nothing is under way, or its time is over.
_SHUTDOWN_S = 3
_TICKS_A_SECOND = 10
# A client's and its upstream's.
_FILES_A_CONNECTION = 2
_OTHER_FILES = 1000


def serve_gateway(
    config: GatewayConfig,
    announce: Callable[[str], None],
    *,
    port_file: Path | None = None,
    log_folder: Path | None = None,
    records_url: str = "",
    lines: LogWriter | None = None,
    tracing: Tracing | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, and then what is under way; `announce` gets the lines for people. With a `log_folder`, or
    the URL of a database, chat answers are logged there, each with its conversation; `lines` gets one line a request, and
    `tracing` its span.

    Raises `ServeError` when the address cannot be listened on, `UsageError` for a configuration that must not be served,
    `StorageError` when the log cannot be written.
    """
    check_config(config)
    context = None
    if config.tls_cert is not None:
        context = build_server_context(config.tls_cert, config.tls_key, config.tls_client_ca)
    _allow_files(_FILES_A_CONNECTION * config.max_connections)
    store = open_store(log_folder, records_url)
    log = None if store is None else ConversationLog(store[0])
    app = create_gateway(config, log=log, lines=lines, tracing=tracing)
    listener = listen(config.host, config.port)
    if store is not None:
        announce(f"conversations are logged in {store[1]}")
    if port_file is not None:
        port_file.unlink(missing_ok=True)
    shown_host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"{'http' if context is None else 'https'}://{shown_host}:{listener.getsockname()[1]}"
    settings = uvicorn.Config(
        app,
        # uvicorn calls it as it would call the class.
        http=cast("type[asyncio.Protocol]", functools.partial(Front, app.state.fast_relay)),
        timeout_keep_alive=round(config.keep_alive_s),
        log_config=None,
        access_log=False,
        backlog=_BACKLOG,
        ws_max_size=MAX_FRAME_BYTES,
        ws_ping_interval=PING_INTERVAL_S,
        ws_ping_timeout=PING_TIMEOUT_S,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        server_header=False,
        ssl_context_factory=None if context is None else lambda settings, build: context,
    )
    # uvicorn raises the signal that stopped it once more; a SIGTERM that has been obeyed is a normal end.
    former = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        drain: Drain = app.state.fast_relay.drain
        _Server(settings, url, announce, port_file, drain, config.drain_s).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, former)
        listener.close()
        if log is not None:
            # Here, and not in the app's lifespan: only now have all answers ended, those that were broken off too.
            log.close()
        if port_file is not None:
            port_file.unlink(missing_ok=True)


def _allow_files(count: int) -> None:
    """Let this process have `count` files open, or as many as it may allow itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to `host`:`port`. Raises `ServeError` when that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host}: {error.strerror or error}.", remedy="--host with an address of this machine"
        ) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted sockets inherit it: an event must not wait for the acknowledgement of the one before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise explain_listening(error, host, port) from error
    return listener


class _Server(uvicorn.Server):
    """Says that it is ready once it is, and drains before it ends."""

    def __init__(
        self,
        settings: uvicorn.Config,
        url: str,
        announce: Callable[[str], None],
        port_file: Path | None,
        drain: Drain,
        drain_s: float,
    ) -> None:
        super().__init__(settings)
        self._url = url
        self._announce = announce
        self._port_file = port_file
        self._drain = drain
        self._drain_s = drain_s
        self._ends_at_s = 0.0
        self._told_to_end: tuple[int, FrameType | None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal has the server drain, the next one has it end."""
        if self._told_to_end is None:
            self._told_to_end = sig, frame
        else:
            self._end_now()
            super().handle_exit(*self._told_to_end)

    async def on_tick(self, counter: int) -> bool:
        now_s = asyncio.get_running_loop().time()
        if counter % _TICKS_A_SECOND == 0:
            for client in self._clients():
                client.check_time(now_s)
        if self._told_to_end is not None and not self.should_exit and self._has_drained(now_s):
            super().handle_exit(*self._told_to_end)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for client in self._clients():
            client.abandon()

    def _clients(self) -> list[Front]:
        return [connection for connection in self.server_state.connections if isinstance(connection, Front)]

    def _has_drained(self, now_s: float) -> bool:
        """Whether nothing is under way any more, or its time is over."""
        under_way = sum(client.is_busy for client in self._clients())
        if not self._drain.has_begun:
            self._drain.has_begun = True
            self._ends_at_s = now_s + self._drain_s
            for client in self._clients():
                client.shutdown()
            if under_way:
                self._announce(f"gateway ends once it has answered {under_way} requests, in {self._drain_s:g} s at most")
        if under_way and now_s >= self._ends_at_s:
            self._end_now()
            return True
        return not under_way

    def _end_now(self) -> None:
        """Wait for nobody."""
        self.config.timeout_graceful_shutdown = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What has been made up to here stays to the end: collections need not look at it.
        gc.freeze()
        if self._port_file is not None:
            with atomic_file(self._port_file) as file:
                file.write(self._url.encode() + b"\n")
        self._announce(f"gateway ready at {self._url}")
