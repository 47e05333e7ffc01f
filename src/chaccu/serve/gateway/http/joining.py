"""The WebSocket at which workers join.

Invariants: nothing but a `Join` with the right token, or a key of scope worker, is heard from a stranger; a worker with a key
serves only the models that the key is bound to, cannot take the place of one with another key, and is let go when the key is
revoked; a page in a browser cannot join (it would send an Origin); whatever ends the connection, the worker leaves the
registry, so its answers go on elsewhere at once; one that is not heard for the stall limit is suspended until it is.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable

from starlette.websockets import WebSocket, WebSocketDisconnect

from chaccu.serve.gateway.access.keys import Key
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.http.admission import Admission
from chaccu.serve.gateway.workers.offers import refuse_offer
from chaccu.serve.gateway.workers.pulse import TICKS
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.remote_worker import RemoteWorker
from chaccu.serve.link import (
    JOIN_TIMEOUT_S,
    PROTOCOL_VERSION,
    Drain,
    Join,
    LinkError,
    ModelOffer,
    Offers,
    OrderDone,
    Output,
    Ping,
    Pong,
    Refused,
    Share,
    Welcome,
    decode_from_worker,
    encode_frame,
)

_POLICY_VIOLATION = 1008
_KEY_CHECK_S = 1.0
_log = logging.getLogger(__name__)


class WorkerDoor:
    """Lets workers in; one per gateway."""

    def __init__(
        self, config: GatewayConfig, admission: Admission, registry: WorkerRegistry, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._admission = admission
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
        # The join token comes first: a worker that has it needs no key.
        by_token = bool(frame.token or self._admission.ring is None) and hmac.compare_digest(
            frame.token.encode(), self._config.join_token.encode()
        )
        key = None if by_token else self._admission.worker_key(frame.token)
        refusal = self._refuse(frame, key) if by_token or key is not None else _stranger(self._admission.ring is not None)
        if refusal is not None:
            await websocket.send_bytes(encode_frame(refusal))
            await websocket.close(_POLICY_VIOLATION)
            return None
        # Its key is part of a worker's name, so that none can take the place of another key's worker.
        identity = frame.worker if key is None else f"{key.id}/{frame.worker}"
        return RemoteWorker(identity, frame.models, self._clock, key)

    def _refuse(self, join: Join, key: Key | None) -> Refused | None:
        if join.protocol != PROTOCOL_VERSION:
            return Refused(
                f"it speaks version {join.protocol} of the protocol, the gateway version {PROTOCOL_VERSION}.",
                "run the same version of chaccu on both sides",
            )
        for offer in join.models:
            refusal = refuse_offer(offer, self._config, key)
            if refusal is not None:
                return refusal
        return None if join.models else Refused("it offers no model.", "start it with --model M")

    async def _serve(self, websocket: WebSocket, worker: RemoteWorker) -> None:
        worker.frames.put_nowait(Welcome())
        self._registry.add(worker)
        parts = [
            asyncio.ensure_future(_send_frames(websocket, worker)),
            asyncio.ensure_future(self._receive_frames(websocket, worker)),
        ]
        if self._config.stall_s:
            parts.append(asyncio.ensure_future(self._watch(worker)))
        if worker.key is not None:
            parts.append(asyncio.ensure_future(self._wait_for_revocation(worker.key)))
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            self._registry.remove(worker)
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _receive_frames(self, websocket: WebSocket, worker: RemoteWorker) -> None:
        while True:
            frame = decode_from_worker(await _receive(websocket))
            worker.pulse.hear()
            if worker.suspended:
                _log.warning("the worker %s answers again", worker.identity)
                self._registry.resume(worker)
            if isinstance(frame, Output):
                worker.take_output(frame.pieces)
            elif isinstance(frame, Share):
                if frame.elsewhere < 0 or frame.gateways < 1:
                    raise LinkError(f"it has {frame.elsewhere} requests of others, from {frame.gateways} gateways in all.")
                self._registry.note_share(worker, frame)
            elif isinstance(frame, Drain):
                worker.draining = True
            elif isinstance(frame, Offers):
                self._change_offers(worker, frame)
            elif isinstance(frame, OrderDone):
                worker.end_order(frame)
            elif not isinstance(frame, Pong):
                raise LinkError("it sent a second Join.")

    def _change_offers(self, worker: RemoteWorker, frame: Offers) -> None:
        """What it may not serve here is left out: other gateways of its may take it."""
        taken: list[ModelOffer] = []
        for offer in frame.models:
            refusal = refuse_offer(offer, self._config, worker.key)
            if refusal is None:
                taken.append(offer)
            else:
                _log.warning("an offer of the worker %s is left out: %s", worker.identity, refusal.reason)
        self._registry.change_offers(worker, tuple(taken))

    async def _watch(self, worker: RemoteWorker) -> None:
        while True:
            await asyncio.sleep(self._config.stall_s / TICKS)
            match worker.pulse.tick(worker.is_busy):
                case "ask":
                    worker.frames.put_nowait(Ping())
                case "stalled":
                    _log.warning("the worker %s was not heard for %g s", worker.identity, self._config.stall_s)
                    worker.suspend()

    async def _wait_for_revocation(self, key: Key) -> None:
        while True:
            if self._admission.ring is None or not self._admission.ring.is_good(key.id):
                raise LinkError(f"its key {key.id} has been revoked.")
            await asyncio.sleep(_KEY_CHECK_S)


def _stranger(has_keys: bool) -> Refused:
    if has_keys:
        return Refused(
            "it shows neither the join token nor a key of scope worker.", "CHACCU_JOIN_TOKEN (or --join-token) with either"
        )
    return Refused("its join token is not the gateway's.", "give both the same CHACCU_JOIN_TOKEN (or --join-token)")


async def _send_frames(websocket: WebSocket, worker: RemoteWorker) -> None:
    while True:
        await websocket.send_bytes(encode_frame(await worker.frames.get()))


async def _receive(websocket: WebSocket) -> bytes:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    data = message.get("bytes")
    if data is None:
        raise LinkError("it sent text, where frames are binary.")
    return bytes(data)
