"""`RemoteWorker`: a joined worker as the gateway holds it, and the answers it is writing.

Invariants: frames leave in the order they were put; an answer counts as outstanding until the worker says that it has ended,
so a cancelled one that still occupies the engine is seen; when the worker is lost or suspended, every open answer learns it
after the pieces that had arrived, and what comes later is dropped; pieces that nobody reads are bounded. It ignores sockets
(`frames` is drained by the connection).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import msgspec

from chaccu.errors import ServeError
from chaccu.serve.gateway.access.keys import Key
from chaccu.serve.gateway.workers.breaker import Breaker
from chaccu.serve.gateway.workers.pulse import Pulse
from chaccu.serve.gateway.workers.rate import RateMeter, SpeedMeter
from chaccu.serve.gateway.workers.routing import WorkerLoad, slots_beside
from chaccu.serve.link import Cancel, Generate, ModelOffer, Order, OrderDone, Piece, Question, Share, ToWorker

_MOST_UNREAD = 4096


class WorkerLostError(ServeError):
    """The worker has gone before the answer was complete."""


class AnswerPausedError(ServeError):
    """So much of the answer is unread that its worker was told to stop; another can go on once it has been read."""


class OrderRefusedError(ServeError):
    """The worker did not carry out an order."""


class AnswerStream:
    """The pieces of one answer, as they come from one worker. `due_tokens`: how many it is expected to have yet; `changed` is
    set whenever there is something to poll."""

    def __init__(self, worker: RemoteWorker, number: int, model: str, due_tokens: float, changed: asyncio.Event) -> None:
        self.worker = worker
        self.model = model
        self.due_tokens = due_tokens
        self._number = number
        self._pieces: list[Piece] = []
        self._changed = changed
        # Why no more pieces come, once that is so.
        self._over: ServeError | None = None

    def poll(self) -> list[Piece]:
        """All pieces that have come since the last call. Raises `WorkerLostError` or `AnswerPausedError` once there are no
        more."""
        if not self._pieces and self._over is not None:
            raise self._over
        pieces, self._pieces = self._pieces, []
        return pieces

    def put(self, piece: Piece) -> None:
        if self._over is not None:
            return
        if len(self._pieces) >= _MOST_UNREAD:
            self._over = AnswerPausedError(f"{_MOST_UNREAD:,} pieces of the answer are unread, the limit.")
            self.cancel()
            return
        self._pieces.append(piece)
        self._changed.set()

    def lose(self) -> None:
        self._over = self._over or WorkerLostError("the worker has gone.")
        self._changed.set()

    def cancel(self) -> None:
        """Nobody waits for the answer any more; nothing happens when it has ended."""
        self.worker.cancel(self._number)


class RemoteWorker:
    """One connection's worker with what it offers. `key`: the API key that it has joined by, if that is how it did."""

    def __init__(
        self, identity: str, offers: tuple[ModelOffer, ...], clock: Callable[[], float], key: Key | None = None
    ) -> None:
        self.identity = identity
        self.key = key
        self.offers = {offer.name: offer for offer in offers}
        self.frames: asyncio.Queue[ToWorker] = asyncio.Queue()
        self.draining = False
        # The gateway gives it nothing new, as an operator wants it.
        self.held = False
        # It was not heard for too long, and its answers have gone on elsewhere.
        self.suspended = False
        self.share = Share()
        self.pulse = Pulse()
        self.breaker = Breaker(clock)
        self.rate = RateMeter(clock)
        self.speed = SpeedMeter(clock)
        self._due_tokens = 0.0
        self._clock = clock
        # Called when other names of its may have more requests than before.
        self.on_more_room: Callable[[], None] = lambda: None
        self._answers: dict[int, AnswerStream] = {}
        self._by_model: Counter[str] = Counter()
        self._orders: dict[int, asyncio.Future[OrderDone]] = {}
        self._number = 0
        self._last_given_s = 0.0

    @property
    def outstanding(self) -> int:
        return len(self._answers)

    @property
    def is_busy(self) -> bool:
        """Whether something is awaited of it."""
        return bool(self._answers or self._orders)

    @property
    def is_open(self) -> bool:
        """Whether it takes new requests."""
        return not (self.draining or self.held or self.suspended)

    def outstanding_of(self, model: str) -> int:
        """How many of its requests are for `model`."""
        return self._by_model[model]

    def slots(self, model: str) -> int:
        """How many requests for `model` this gateway may give it at once: its other names have a part in its slots, as other
        gateways have."""
        others = sum(count > 0 for name, count in self._by_model.items() if name != model)
        return slots_beside(
            self.offers[model].slots,
            elsewhere=self.share.elsewhere + self.outstanding - self._by_model[model],
            parties=self.share.gateways * (1 + others),
        )

    def load(self, model: str, *, tokens: float = 1.0, typical_speed: float = 1.0, cached: float = 0.0) -> WorkerLoad:
        """This worker as routing sees it for `model`; `typical_speed` counts until its own is known, and `tokens` is what an
        answer has: so much is due of each request that other gateways gave it.
        """
        offer = self.offers[model]
        left = slots_beside(offer.slots, elsewhere=self.share.elsewhere, parties=self.share.gateways)
        return WorkerLoad(
            slots=offer.slots,
            # What other gateways have of the slots looks as if it were this one's own.
            outstanding=self.outstanding + offer.slots - left,
            last_given_s=self._last_given_s,
            due_tokens=self._due_tokens + self.share.elsewhere * tokens,
            speed=self.speed.estimate(typical_speed),
            weight=offer.weight,
            priority=offer.priority,
            cached=cached,
            is_open=self.is_open,
            is_resting=not self.breaker.takes(offer.slots),
        )

    def open(self, request: Generate | Question, due_tokens: float, changed: asyncio.Event) -> AnswerStream:
        """Give the worker a request, under a number of its own, whose answer is expected to have `due_tokens`; returns its
        pieces to come, of which `changed` tells."""
        self._number += 1
        self._last_given_s = self._clock()
        answer = self._answers[self._number] = AnswerStream(self, self._number, request.model, due_tokens, changed)
        self._by_model[request.model] += 1
        self._due_tokens += due_tokens
        self.speed.set_active(self.outstanding)
        self.breaker.begin()
        self.frames.put_nowait(msgspec.structs.replace(request, request=self._number))
        return answer

    async def order(self, order: Order) -> None:
        """Have the worker carry out `order`, under a number of its own, and wait until it has.

        Raises `OrderRefusedError` when it has not, `WorkerLostError` when it has gone or is not heard.
        """
        self._number += 1
        awaited: asyncio.Future[OrderDone] = asyncio.get_running_loop().create_future()
        self._orders[self._number] = awaited
        self.frames.put_nowait(msgspec.structs.replace(order, order=self._number))
        done = await awaited
        if done.refusal:
            raise OrderRefusedError(done.refusal, remedy=done.remedy)

    def end_order(self, done: OrderDone) -> None:
        """The worker says what has become of an order."""
        awaited = self._orders.pop(done.order, None)
        if awaited is not None and not awaited.done():
            awaited.set_result(done)

    def cancel(self, number: int) -> None:
        """Nobody waits for the answer any more; nothing happens when it has ended."""
        if number in self._answers:
            self.frames.put_nowait(Cancel(number))

    def take_output(self, pieces: list[Piece]) -> None:
        """Hand pieces to their answers; those of answers that have ended are dropped."""
        tokens = sum(piece.tokens for piece in pieces)
        self.rate.add(tokens)
        self.speed.add(tokens)
        for piece in pieces:
            answer = self._answers.get(piece.request)
            if answer is None:
                continue
            answer.put(piece)
            if piece.end is not None:
                self._end(answer, piece)
            elif answer.due_tokens > piece.tokens:
                # One that is longer than expected still has something to come.
                answer.due_tokens -= piece.tokens
                self._due_tokens -= piece.tokens

    def _end(self, answer: AnswerStream, last: Piece) -> None:
        del self._answers[last.request]
        self._by_model[answer.model] -= 1
        self.speed.set_active(self.outstanding)
        # Nothing is due of nothing, whatever rounding has left.
        self._due_tokens = self._due_tokens - answer.due_tokens if self._answers else 0.0
        if last.end in ("stop", "length", "tool_calls"):
            self.breaker.succeed()
        elif last.failure is not None and last.failure.kind == "engine_failed":
            self.breaker.fail()
        else:
            self.breaker.abandon()
        if len(self._by_model) > 1:
            self.on_more_room()

    def suspend(self) -> None:
        """It is not heard any more: its answers go on elsewhere. They count as outstanding until it says that they ended."""
        self.suspended = True
        for answer in self._answers.values():
            answer.lose()
        self._lose_orders("it is not heard")

    def lose(self) -> None:
        """The connection has gone."""
        for answer in self._answers.values():
            answer.lose()
        self._answers.clear()
        self._by_model.clear()
        self._lose_orders("it has gone")

    def _lose_orders(self, why: str) -> None:
        orders, self._orders = self._orders, {}
        for awaited in orders.values():
            if not awaited.done():
                awaited.set_exception(WorkerLostError(f"the worker was lost with this order: {why}."))
