"""`stay_joined`: one gateway of a worker: dial, join, serve its requests, and dial again when it comes back.

Invariants: a lost gateway is tried again for as long as this runs; a refusal is final, and an error. It ignores the other
gateways that the worker has joined.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from chaccu.errors import ServeError
from chaccu.serve.link import (
    JOIN_TIMEOUT_S,
    MAX_FRAME_BYTES,
    PING_INTERVAL_S,
    PING_TIMEOUT_S,
    Join,
    Refused,
    Welcome,
    decode_to_worker,
    encode_frame,
)
from chaccu.serve.worker.gateways import GatewayAddress

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 1.5


async def stay_joined(
    gateway: GatewayAddress,
    build_join: Callable[[], Join],
    serve: Callable[[ClientConnection, Join], Awaitable[None]],
    is_named: Callable[[], bool],
    draining: asyncio.Event,
    announce: Callable[[str], None],
    *,
    context: ssl.SSLContext | None,
    ready: str,
) -> None:
    """Be a worker of `gateway` until `draining` is set, or its connection is gone and it is not named any more; `serve` gets
    each connection that has joined, with what it joined by, `announce` what happens, and then `ready`. Raises `ServeError` when
    the gateway refuses.
    """
    delay_s, reported = _FIRST_DELAY_S, False
    while not draining.is_set() and is_named():
        try:
            async with _connect(gateway, context) as connection:
                join = build_join()
                await _join(connection, join)
                announce(ready)
                delay_s, reported = _FIRST_DELAY_S, False
                await serve(connection, join)
        except (OSError, WebSocketException, TimeoutError) as error:
            if not reported:
                announce(f"{_reason(error, gateway.shown)}; trying again")
                reported = True
        # Jitter: a restarted gateway must not meet all its workers in one instant.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s * random.uniform(0.7, 1.0)):
                await draining.wait()
        delay_s = min(2 * delay_s, _LONGEST_DELAY_S)


def _connect(gateway: GatewayAddress, context: ssl.SSLContext | None) -> connect:
    loopback = urlsplit(gateway.url).hostname in ("127.0.0.1", "localhost", "::1")
    # Dialled in place of the URL's host, which stays what a certificate must name.
    dialled: dict[str, Any] = {} if gateway.host is None else {"host": gateway.host}
    return connect(
        gateway.url,
        ssl=context,
        max_size=MAX_FRAME_BYTES,
        compression=None,
        ping_interval=PING_INTERVAL_S,
        ping_timeout=PING_TIMEOUT_S,
        open_timeout=JOIN_TIMEOUT_S,
        close_timeout=1,
        proxy=None if loopback or gateway.host is not None else True,
        **dialled,
    )


async def _join(connection: ClientConnection, join: Join) -> None:
    await connection.send(encode_frame(join))
    async with asyncio.timeout(JOIN_TIMEOUT_S):
        data = await connection.recv()
    answer = decode_to_worker(data if isinstance(data, bytes) else data.encode())
    if isinstance(answer, Refused):
        raise ServeError(f"the gateway refused this worker: {answer.reason}", remedy=answer.remedy)
    if not isinstance(answer, Welcome):
        raise ServeError(
            f"the gateway answered a join with a {type(answer).__name__} frame.", remedy="run the same version on both sides"
        )


def _reason(error: Exception, gateway: str) -> str:
    if isinstance(error, ConnectionClosed):
        return f"the connection to the gateway at {gateway} is lost"
    if isinstance(error, InvalidStatus):
        return f"{gateway} answers with status {error.response.status_code} and is no Chaccu gateway"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of {gateway} is not trusted ({error.verify_message}; --tls-ca names its authority)"
    return f"the gateway at {gateway} is not reachable ({error or type(error).__name__})"
