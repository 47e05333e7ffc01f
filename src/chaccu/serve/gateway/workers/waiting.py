"""`ModelQueue`: who may be answered now, who waits and who is turned away, for one model.

Pure policy on an injected clock: no sockets, no tasks. Invariants: never more under way than there is room for; nobody waits
while there is room; a key's requests come in their order, and keys take turns, so one with a thousand waiting delays another by
one request; at most `size` wait, and where that is reached the key with the most makes room. It ignores what is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from chaccu.errors import ServeError
from chaccu.serve.gateway.workers.rate import RateMeter

_LONGEST_RETRY_S = 60.0


class QueueFullError(ServeError):
    """As many requests wait as may."""


class Waiter:
    """One request: `wake` is called once when it need not wait any more, for either reason."""

    __slots__ = ("deadline_s", "key", "state", "wake")

    def __init__(self, key: str, deadline_s: float, wake: Callable[[], None]) -> None:
        self.key = key
        self.deadline_s = deadline_s
        self.wake = wake
        self.state: Literal["waiting", "under way", "refused"] = "waiting"


class ModelQueue:
    """The queue of one model. `room` in its methods is how many requests its workers can answer at once, now."""

    def __init__(self, *, size: int, wait_s: float, clock: Callable[[], float]) -> None:
        self._size = size
        self._wait_s = wait_s
        self._clock = clock
        self._under_way = 0
        self._waiting: dict[str, deque[Waiter]] = {}
        # Keys in the order of their turns; each key that waits is in it once.
        self._turns: deque[str] = deque()
        self._ended = RateMeter(clock, window_s=30.0)

    @property
    def under_way(self) -> int:
        return self._under_way

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def enter(self, key: str, room: int, wake: Callable[[], None]) -> Waiter:
        """A request of `key` comes: it is under way at once, or waits. Raises `QueueFullError`.

        With no room at all it is under way, for the search for a worker has a deadline of its own, as long as no more than
        `size` search.
        """
        waiter = Waiter(key, self._clock() + self._wait_s, wake)
        if not self._turns and self._under_way < (room or self._size):
            self._begin(waiter)
            return waiter
        if self.waiting >= self._size and not self._make_room(key):
            raise QueueFullError(f"{self.waiting:,} requests wait already, the limit.")
        if key not in self._waiting:
            self._waiting[key] = deque()
            self._turns.append(key)
        self._waiting[key].append(waiter)
        return waiter

    def leave(self, waiter: Waiter, room: int) -> None:
        """The request has been answered, or nobody waits for it any more."""
        if waiter.state == "under way":
            self._under_way -= 1
            self._ended.add(1)
        elif waiter.state == "waiting":
            self._drop(waiter)
        waiter.state = "refused"
        self.fill(room)

    def fill(self, room: int) -> None:
        """Begin what there is room for; those whose time is up are refused."""
        while self._turns and self._under_way < room:
            key = self._turns.popleft()
            waiter = self._waiting[key].popleft()
            if self._waiting[key]:
                self._turns.append(key)
            else:
                del self._waiting[key]
            if waiter.deadline_s <= self._clock():
                waiter.state = "refused"
            else:
                self._begin(waiter)
            waiter.wake()

    def refuse_all(self) -> None:
        """Nobody will be answered."""
        waiting = [waiter for waiters in self._waiting.values() for waiter in waiters]
        self._waiting.clear()
        self._turns.clear()
        for waiter in waiting:
            waiter.state = "refused"
            waiter.wake()

    def retry_after_s(self) -> float:
        """About when a request that is refused now would find a place: when those that wait have been answered."""
        rate = self._ended.per_second()
        return min(_LONGEST_RETRY_S, max(1.0, (self.waiting + 1) / rate)) if rate > 0 else min(_LONGEST_RETRY_S, self._wait_s)

    def _begin(self, waiter: Waiter) -> None:
        waiter.state = "under way"
        self._under_way += 1

    def _make_room(self, key: str) -> bool:
        """Refuse the newest request of the key that has the most waiting, if that is more than `key` will have."""
        if not self._waiting:
            return False
        heaviest = max(self._waiting, key=lambda one: len(self._waiting[one]))
        if len(self._waiting[heaviest]) <= len(self._waiting.get(key, ())) + 1:
            return False
        newest = self._waiting[heaviest].pop()
        newest.state = "refused"
        newest.wake()
        return True

    def _drop(self, waiter: Waiter) -> None:
        waiters = self._waiting[waiter.key]
        waiters.remove(waiter)
        if not waiters:
            del self._waiting[waiter.key]
            self._turns.remove(waiter.key)
