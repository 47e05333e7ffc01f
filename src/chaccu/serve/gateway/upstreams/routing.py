"""Which upstream gets a request, and how long one that failed is left out.

Pure policies over plain records and an injected clock: no sockets. Invariants: an upstream that is left out gets nothing; of
several failures at once the first one alone counts. It ignores what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

_FIRST_PROBE_S = 0.25
_LONGEST_PROBE_S = 1.0


class UpstreamLoad(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An upstream as routing sees it.

    `outstanding`: requests it has; `last_given_s`: when it last got one, on any clock; `is_left_out`: it failed, and has not
    answered a probe since; `has_failed`: it failed this very request.
    """

    outstanding: int
    last_given_s: float
    weight: float = 1.0
    priority: int = 0
    is_left_out: bool = False
    has_failed: bool = False


def choose_upstream(loads: Sequence[UpstreamLoad]) -> int | None:
    """Index of the upstream to use, or None when all are left out.

    One that failed this request gets it again only where there is no other; of the rest those of the highest priority; of these
    the one with the least outstanding for its weight, and among equals the one that rested longest.
    """
    able = [index for index, load in enumerate(loads) if not load.is_left_out]
    return min(able, key=lambda index: _rank(loads[index]), default=None)


def _rank(load: UpstreamLoad) -> tuple[bool, int, float, float]:
    return load.has_failed, -load.priority, (load.outstanding + 1) / load.weight, load.last_given_s


class UpstreamBreaker:
    """Leaves an upstream out after a failure, until a probe was answered; `clock` gives seconds.

    The first probe is due after `first_s`; each failure in a row, of a request or of a probe, doubles the wait, to `longest_s`
    at most.
    """

    def __init__(
        self, clock: Callable[[], float], *, first_s: float = _FIRST_PROBE_S, longest_s: float = _LONGEST_PROBE_S
    ) -> None:
        self.is_left_out = False
        self.since_s = clock()
        self._clock = clock
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_wait_s = first_s
        self._probe_at_s = 0.0

    def fail(self) -> bool:
        """A request has failed; returns whether the upstream was in use until now."""
        if self.is_left_out:
            return False
        self._change(True)
        self._back_off()
        return True

    def succeed(self) -> None:
        """A request was answered."""
        self._next_wait_s = self._first_s

    def end_probe(self, answered: bool) -> None:
        """A probe has ended."""
        if answered:
            self._change(False)
        else:
            self._back_off()

    @property
    def probe_in_s(self) -> float:
        """Seconds until the next probe is due."""
        return max(0.0, self._probe_at_s - self._clock())

    def _change(self, left_out: bool) -> None:
        self.is_left_out = left_out
        self.since_s = self._clock()

    def _back_off(self) -> None:
        self._probe_at_s = self._clock() + self._next_wait_s
        self._next_wait_s = min(2 * self._next_wait_s, self._longest_s)
