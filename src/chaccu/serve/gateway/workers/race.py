"""`Race`: a request at one worker, or at two until the first of them has text.

Invariants: all pieces it gives are of one worker; the other one is told at once that it is not wanted; a racer that is lost or
fails before any text leaves the race to the other. It ignores what becomes of the text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from chaccu.serve.gateway.workers.hedging import FirstTextWait
from chaccu.serve.gateway.workers.prefix_table import Prefix
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.remote_worker import AnswerStream, RemoteWorker, WorkerLostError
from chaccu.serve.link import Generate, Piece, Question

# Another worker goes on: after one was lost, after its engine failed, after a client that had not read. A second one is asked
# for the first text; it is the first to have it.
AnswerEvent = Literal["continued", "retried", "paused", "hedged", "hedge_won"]


class Hedge:
    """The second worker for one answer: asked when the first text takes unusually long, as `wait` has it."""

    def __init__(
        self,
        registry: WorkerRegistry,
        prefix: Prefix,
        due_tokens: float,
        needs: frozenset[str],
        wait: FirstTextWait,
        on_event: Callable[[AnswerEvent], None],
    ) -> None:
        self.after_s = wait.after_s
        self._registry = registry
        self._prefix = prefix
        self._due_tokens = due_tokens
        self._needs = needs
        self._wait = wait
        self._on_event = on_event

    def second(self, first: RemoteWorker) -> RemoteWorker | None:
        """A worker to ask beside `first`; None where none is free, or too many were asked lately."""
        if not self._wait.may_hedge:
            return None
        avoid = (first.identity,)
        worker = self._registry.pick(self._prefix, tokens=self._due_tokens, needs=self._needs, avoid=avoid, is_spare=True)
        if worker is not None:
            self._wait.hedge()
            self._on_event("hedged")
        return worker

    def end(self, *, has_second_won: bool) -> None:
        """The first text has come."""
        self._wait.end()
        if has_second_won:
            self._on_event("hedge_won")


class Race:
    """`request` at `worker`, and at the worker that `hedge` gives where no text has come in its time."""

    def __init__(self, worker: RemoteWorker, request: Generate | Question, due_tokens: float, hedge: Hedge | None) -> None:
        self._first = worker
        self._request = request
        self._due_tokens = due_tokens
        self._hedge = hedge
        self._changed = asyncio.Event()
        self._racers: list[AnswerStream] = []
        self._enter(worker)

    @property
    def worker(self) -> RemoteWorker:
        """The worker that answers; while two are asked, the one that was asked first."""
        return self._racers[0].worker

    async def take(self) -> list[Piece]:
        """All pieces that have come since the last call; waits for one. Raises `WorkerLostError` or `AnswerPausedError` once
        there are no more."""
        hedge, self._hedge = self._hedge, None
        if hedge is None:
            return await self._take_next()
        timer = None
        if hedge.after_s is not None:
            timer = asyncio.get_running_loop().call_later(hedge.after_s, self._enter_second, hedge)
        try:
            pieces = await self._take_next()
        finally:
            if timer is not None:
                timer.cancel()
        hedge.end(has_second_won=self.worker is not self._first)
        return pieces

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        for racer in self._racers:
            racer.cancel()

    async def _take_next(self) -> list[Piece]:
        while not (pieces := self._poll()):
            await self._changed.wait()
            self._changed.clear()
        return pieces

    def _enter(self, worker: RemoteWorker) -> None:
        self._racers.append(worker.open(self._request, self._due_tokens, self._changed))

    def _enter_second(self, hedge: Hedge) -> None:
        second = None if self._changed.is_set() else hedge.second(self._first)
        if second is not None:
            self._enter(second)

    def _poll(self) -> list[Piece]:
        if len(self._racers) == 1:
            return self._racers[0].poll()
        for racer in tuple(self._racers):
            try:
                pieces = racer.poll()
            except WorkerLostError:
                if len(self._racers) == 1:
                    raise
                self._racers.remove(racer)
                continue
            if pieces and pieces[0].end == "failed" and len(self._racers) > 1:
                # Should the other one fail too, that failure is heard.
                self._racers.remove(racer)
            elif pieces:
                self._racers.remove(racer)
                self.leave()
                self._racers = [racer]
                return pieces
        return []
