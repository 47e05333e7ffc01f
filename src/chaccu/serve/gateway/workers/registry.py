"""`WorkerRegistry`: which workers serve which model now, and which ones were lost.

Invariants: a model that was served once stays known until its last worker withdraws it, so its absence is a passing state and
not a wrong name; a worker that
joins again replaces what is left of its former self; the list of lost workers is bounded. `routing` decides who gets a request;
what it needs to know of requests is kept here. It ignores how an answer is made.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Literal

import msgspec

from chaccu.serve.gateway.errors import no_worker, unknown_model
from chaccu.serve.gateway.workers.prefix_table import Prefix, PrefixTable
from chaccu.serve.gateway.workers.rate import AnswerLengths
from chaccu.serve.gateway.workers.remote_worker import RemoteWorker
from chaccu.serve.gateway.workers.routing import choose_worker
from chaccu.serve.link import ModelOffer, Share

_LOST_REMEMBERED = 100

WorkerState = Literal["ready", "draining", "resting", "suspended", "lost"]


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model of one worker, for people and scripts. `base`: of an adapter, the model it is over; `elsewhere`: requests that
    the worker has from other gateways; `since_s`: seconds since it joined, or was lost."""

    model: str
    base: str
    worker: str
    engine: str
    state: WorkerState
    device: str
    slots: int
    context_tokens: int
    weight: float
    priority: int
    outstanding: int
    elsewhere: int
    tokens_per_s: float
    since_s: float


class WorkerRegistry:
    """Joined workers by model."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._workers: dict[str, RemoteWorker] = {}
        self._joined_s: dict[str, float] = {}
        self._lost: deque[tuple[RemoteWorker, float]] = deque(maxlen=_LOST_REMEMBERED)
        self._known: set[str] = set()
        self._held: set[str] = set()
        self._changed = asyncio.Event()
        self._lengths = AnswerLengths()
        self._prefixes = PrefixTable()
        # Called when workers can take more than before.
        self.on_more_room: Callable[[], None] = lambda: None

    def add(self, worker: RemoteWorker) -> None:
        """`worker` has joined."""
        former = self._workers.pop(worker.identity, None)
        if former is not None:
            former.lose()
        self._lost = deque((entry for entry in self._lost if entry[0].identity != worker.identity), maxlen=_LOST_REMEMBERED)
        self._workers[worker.identity] = worker
        worker.held = worker.identity in self._held
        worker.on_more_room = lambda: self.on_more_room()
        self._joined_s[worker.identity] = self._clock()
        self._known.update(worker.offers)
        self._wake()

    def remove(self, worker: RemoteWorker) -> None:
        """`worker` has gone; its open answers learn it."""
        worker.lose()
        if self._workers.get(worker.identity) is worker:
            del self._workers[worker.identity]
            del self._joined_s[worker.identity]
            self._lost.append((worker, self._clock()))

    def find(self, identity: str) -> RemoteWorker | None:
        """The joined worker of this name."""
        return self._workers.get(identity)

    def change_offers(self, worker: RemoteWorker, offers: tuple[ModelOffer, ...]) -> None:
        """`worker` serves these from now on. A model that was withdrawn and that no other worker has is known no more."""
        withdrawn = worker.offers.keys() - {offer.name for offer in offers}
        worker.offers = {offer.name: offer for offer in offers}
        if self._workers.get(worker.identity) is worker:
            self._known.update(worker.offers)
            self._known -= {name for name in withdrawn if not self.offers(name)}
            self._wake()

    def resume(self, worker: RemoteWorker) -> None:
        """`worker` was suspended and is heard again."""
        worker.suspended = False
        self._wake()

    def note_share(self, worker: RemoteWorker, share: Share) -> None:
        """Other gateways give `worker` more or less than before."""
        former, worker.share = worker.share, share
        if share.elsewhere < former.elsewhere or share.gateways < former.gateways:
            self.on_more_room()

    def hold(self, worker: RemoteWorker, held: bool) -> None:
        """Give a worker nothing new, also when it joins again, or give it requests as before."""
        if worker.held != held:
            worker.held = held
            (self._held.add if held else self._held.discard)(worker.identity)
            self._wake()

    def models(self) -> dict[str, int]:
        """Models that a worker serves now, with the context in tokens that all of their workers have."""
        contexts: dict[str, int] = {}
        for worker in self._workers.values():
            for offer in worker.offers.values():
                contexts[offer.name] = min(offer.context_tokens, contexts.get(offer.name, offer.context_tokens))
        return contexts

    def room(self, model: str) -> int:
        """How many requests the workers of `model` can answer at once, without those that take none; one that rests counts only
        where all do."""
        able = [worker for worker in self._workers.values() if model in worker.offers and worker.is_open]
        awake = sum(worker.breaker.takes(worker.slots(model)) for worker in able)
        return awake or sum(worker.slots(model) for worker in able)

    def knows(self, model: str) -> bool:
        """Whether a worker serves or has served `model`."""
        return model in self._known

    def check_known(self, model: str, others: Iterable[str]) -> None:
        """Raise `ApiError` unless `model` is known; `others` are names that exist beside the workers' models."""
        if not self.knows(model):
            raise unknown_model(model, [*self._known, *others])

    def offers(self, model: str) -> list[ModelOffer]:
        """What the workers that are joined offer of `model`."""
        return [worker.offers[model] for worker in self._workers.values() if model in worker.offers]

    async def acquire(
        self, prefix: Prefix, *, tokens: float, wait_s: float, needs: frozenset[str] = frozenset()
    ) -> RemoteWorker:
        """The worker to use for one more request, with about `tokens` of answer, that has the abilities it `needs`; waits for
        one to join. Raises `ApiError` when none has joined after `wait_s`, or the model is withdrawn.
        """
        worker = self.pick(prefix, tokens=tokens, needs=needs)
        if worker is not None:
            return worker
        try:
            async with asyncio.timeout(wait_s):
                while (worker := self.pick(prefix, tokens=tokens, needs=needs)) is None:
                    self.check_known(prefix.model, ())
                    await self._changed.wait()
                return worker
        except TimeoutError:
            raise no_worker(prefix.model, wait_s) from None

    def pick(
        self,
        prefix: Prefix,
        *,
        tokens: float,
        needs: frozenset[str] = frozenset(),
        avoid: Collection[str] = (),
        is_spare: bool = False,
    ) -> RemoteWorker | None:
        """The worker to use now that has the abilities it `needs`, none of those to `avoid`; None when there is none.
        `is_spare`: one with a free slot.
        """
        candidates = [
            worker
            for worker in self._workers.values()
            if (offer := worker.offers.get(prefix.model)) is not None
            and worker.identity not in avoid
            and needs.issubset(offer.abilities)
        ]
        measured = [speed for worker in candidates if (speed := worker.speed.measured()) is not None]
        typical_speed = sum(measured) / len(measured) if measured else 1.0
        cached = self._prefixes.cached(prefix, {worker.identity for worker in candidates})
        loads = [
            worker.load(prefix.model, tokens=tokens, typical_speed=typical_speed, cached=cached.get(worker.identity, 0.0))
            for worker in candidates
        ]
        chosen = choose_worker(loads, tokens)
        if chosen is None or (is_spare and (loads[chosen].is_resting or loads[chosen].outstanding >= loads[chosen].slots)):
            return None
        self._prefixes.add(prefix, candidates[chosen].identity)
        return candidates[chosen]

    def expected_tokens(self, model: str, limit: int | None) -> float:
        """How long an answer will be, by those before it; `limit` is the most it may have."""
        return self._lengths.expected(model, limit)

    def note_answer(self, prefix: Prefix, worker: RemoteWorker, tokens: int) -> None:
        """An answer has ended: `worker` holds `prefix` now, which has the answer at its end; `tokens`: the answer's."""
        self._lengths.add(prefix.model, tokens)
        self._prefixes.add(prefix, worker.identity)

    def statuses(self) -> list[WorkerStatus]:
        """All workers by model: those that serve first, then those lost, latest first."""
        now = self._clock()
        joined = [_status(worker, _state(worker), now - self._joined_s[worker.identity]) for worker in self._workers.values()]
        lost = [_status(worker, "lost", now - at_s) for worker, at_s in reversed(self._lost)]
        return [status for statuses in (*joined, *lost) for status in statuses]

    def _wake(self) -> None:
        """Everyone who waits looks again; the next wait begins with a fresh event."""
        self._changed.set()
        self._changed = asyncio.Event()
        self.on_more_room()


def _state(worker: RemoteWorker) -> WorkerState:
    if worker.suspended:
        return "suspended"
    if not worker.is_open:
        return "draining"
    return "ready" if worker.breaker.takes(1) else "resting"


def _status(worker: RemoteWorker, state: WorkerState, since_s: float) -> list[WorkerStatus]:
    return [
        WorkerStatus(
            model=offer.name,
            base=offer.base,
            worker=worker.identity,
            engine=offer.engine,
            state=state,
            device=offer.device,
            slots=offer.slots,
            context_tokens=offer.context_tokens,
            weight=offer.weight,
            priority=offer.priority,
            outstanding=worker.outstanding_of(offer.name),
            elsewhere=worker.share.elsewhere,
            tokens_per_s=round(worker.rate.per_second(), 1),
            since_s=round(since_s, 1),
        )
        for offer in worker.offers.values()
    ]
