"""The WebSocket at which workers join.

Invariants: nothing but a `Join` with the right token is heard from a stranger; a page in a browser cannot join (it would send
an Origin); whatever ends the connection, the worker leaves the registry, so its answers go on elsewhere at once.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable

from starlette.websockets import WebSocket, WebSocketDisconnect

from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.registry import WorkerRegistry
from chaccu.serve.gateway.remote_worker import RemoteWorker
from chaccu.serve.link import (
    JOIN_TIMEOUT_S,
    PROTOCOL_VERSION,
    Drain,
    Join,
    LinkError,
    Output,
    Refused,
    Welcome,
    decode_from_worker,
    encode_frame,
)

_MAX_NAME_CHARS = 200
_POLICY_VIOLATION = 1008
_log = logging.getLogger(__name__)


class WorkerDoor:
    """Lets workers in; one per gateway."""

    def __init__(self, config: GatewayConfig, registry: WorkerRegistry, clock: Callable[[], float]) -> None:
        self._config = config
        self._registry = registry
        self._clock = clock

    async def __call__(self, websocket: WebSocket) -> None:
        """Serve one worker's connection until it ends."""
        if "origin" in websocket.headers:
            await websocket.close(_POLICY_VIOLATION)
            return
        await websocket.accept()
        try:
            worker = await self._greet(websocket)
            if worker is not None:
                await self._serve(websocket, worker)
        except LinkError as error:
            _log.warning("a worker's connection is closed: %s", error.message)
            await websocket.close(_POLICY_VIOLATION)
        except (WebSocketDisconnect, TimeoutError):
            # Either the worker left, or a stranger said nothing in time; both are over.
            return

    async def _greet(self, websocket: WebSocket) -> RemoteWorker | None:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            frame = decode_from_worker(await _receive(websocket))
        if not isinstance(frame, Join):
            raise LinkError(f"its first frame is a {type(frame).__name__} and no Join.")
        refusal = self._refuse(frame)
        if refusal is not None:
            await websocket.send_bytes(encode_frame(refusal))
            await websocket.close(_POLICY_VIOLATION)
            return None
        return RemoteWorker(frame.worker, frame.models, self._clock)

    def _refuse(self, join: Join) -> Refused | None:
        if not hmac.compare_digest(join.token.encode(), self._config.join_token.encode()):
            return Refused("its join token is not the gateway's.", "give both the same CHACCU_JOIN_TOKEN (or --join-token)")
        if join.protocol != PROTOCOL_VERSION:
            return Refused(
                f"it speaks version {join.protocol} of the protocol, the gateway version {PROTOCOL_VERSION}.",
                "run the same version of chaccu on both sides",
            )
        upstreams = {upstream.name for upstream in self._config.upstreams}
        for offer in join.models:
            if offer.name in upstreams:
                return Refused(f"the gateway already serves {offer.name!r} from an upstream.", "--name another name")
            if not offer.name.isprintable() or not 0 < len(offer.name) <= _MAX_NAME_CHARS:
                return Refused("a model's name must have 1 to 200 printable characters.", "--name another name")
            if offer.slots < 1 or offer.context_tokens < 1:
                return Refused(f"it offers {offer.slots} slots of {offer.context_tokens} tokens.", "both must be 1 or more")
        return None if join.models else Refused("it offers no model.", "start it with --model M")

    async def _serve(self, websocket: WebSocket, worker: RemoteWorker) -> None:
        worker.frames.put_nowait(Welcome())
        self._registry.add(worker)
        parts = [
            asyncio.ensure_future(_send_frames(websocket, worker)),
            asyncio.ensure_future(_receive_frames(websocket, worker)),
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            self._registry.remove(worker)
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)


async def _send_frames(websocket: WebSocket, worker: RemoteWorker) -> None:
    while True:
        await websocket.send_bytes(encode_frame(await worker.frames.get()))


async def _receive_frames(websocket: WebSocket, worker: RemoteWorker) -> None:
    while True:
        frame = decode_from_worker(await _receive(websocket))
        if isinstance(frame, Output):
            worker.take_output(frame.pieces)
        elif isinstance(frame, Drain):
            worker.draining = True
        else:
            raise LinkError("it sent a second Join.")


async def _receive(websocket: WebSocket) -> bytes:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    data = message.get("bytes")
    if data is None:
        raise LinkError("it sent text, where frames are binary.")
    return bytes(data)
