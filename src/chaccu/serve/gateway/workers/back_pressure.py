"""`BackPressure`: requests take their turn at the workers of a model.

Invariants: a turn is given back whatever ends its request; who waits in vain is told when to come again; workers that join let
waiting requests on at once. It ignores who is first (`waiting` decides), which worker answers, and upstreams, which queue for
themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable

from chaccu.serve.gateway.errors import ApiError, no_worker
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.waiting import ModelQueue, QueueFullError, Waiter


class BackPressure:
    """The queues of one gateway, one for each model that a worker has served."""

    def __init__(self, registry: WorkerRegistry, *, size: int, wait_s: float, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._size = size
        self._wait_s = wait_s
        self._clock = clock
        self._queues: dict[str, ModelQueue] = {}
        registry.on_more_room = self._look_again

    def waiting(self) -> dict[str, int]:
        """How many requests wait, by model."""
        return {model: queue.waiting for model, queue in self._queues.items()}

    @contextlib.asynccontextmanager
    async def turn(self, model: str, key: str) -> AsyncIterator[None]:
        """Wait until there is room for one more request of `model`, fairly between keys, and hold it for the block.

        Raises `ApiError`: 429 when too many wait or for too long, 503 when there is no worker, 404 when its last one has
        withdrawn the model.
        """
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = ModelQueue(size=self._size, wait_s=self._wait_s, clock=self._clock)
        changed = asyncio.Event()
        try:
            waiter = queue.enter(key, self._registry.room(model), changed.set)
        except QueueFullError as error:
            raise _refusal(model, f"{queue.waiting:,} requests for it wait already", queue) from error
        try:
            if waiter.state == "waiting":
                await self._wait(model, queue, waiter, changed)
            yield
        finally:
            queue.leave(waiter, self._registry.room(model))

    async def _wait(self, model: str, queue: ModelQueue, waiter: Waiter, changed: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                await changed.wait()
        if waiter.state == "under way":
            return
        self._registry.check_known(model, ())
        if not self._registry.room(model):
            raise no_worker(model, self._wait_s)
        if waiter.state == "waiting":
            raise _refusal(model, f"this request waited {self._wait_s:g} s, the limit", queue)
        raise _refusal(model, "it had to make room in the queue", queue)

    def _look_again(self) -> None:
        for model, queue in self._queues.items():
            if self._registry.knows(model):
                queue.fill(self._registry.room(model))
            else:
                queue.refuse_all()


def _refusal(model: str, why: str, queue: ModelQueue) -> ApiError:
    again_s = math.ceil(queue.retry_after_s())
    return ApiError(
        429,
        f"The workers of {model!r} have more than they can do, and {why}. Try again in {again_s} s.",
        kind="requests",
        code="queue_full",
        param="model",
        headers={"retry-after": str(again_s)},
    )
