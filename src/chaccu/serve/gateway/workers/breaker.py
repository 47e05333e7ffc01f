"""`Breaker`: a worker whose engine fails is left out for a while.

After three failures in a row it rests; then one request tries it. When that is answered all is as before, when it fails the
rest is twice as long, a minute at most. Pure policy on an injected clock. Invariants: while it rests it takes nothing, and on
trial one request at a time; what ends without a verdict (its client left, or the request itself was wrong) leaves the trial
open. It ignores whether there is another worker: a model's only one is asked even while it rests (`routing`).
"""

from __future__ import annotations

from collections.abc import Callable

_FAILURES = 3
_FIRST_REST_S = 1.0
_LONGEST_REST_S = 60.0


class Breaker:
    """The breaker of one worker."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._rest_s = _FIRST_REST_S
        self._until_s: float | None = None
        self._on_trial = False

    def takes(self, slots: int) -> int:
        """How many requests at once it may have, of the `slots` that its worker has."""
        if self._until_s is None:
            return slots
        return 0 if self._is_resting() else 1

    def begin(self) -> None:
        """A request has been given to the worker."""
        self._on_trial = self._on_trial or (self._until_s is not None and not self._is_resting())

    def succeed(self) -> None:
        """An answer has come to its end."""
        self._failures, self._rest_s, self._until_s, self._on_trial = 0, _FIRST_REST_S, None, False

    def fail(self) -> None:
        """The engine has failed at a request."""
        self._failures += 1
        if self._failures < _FAILURES or (self._until_s is not None and not self._on_trial):
            # Those that were under way when the rest began fail too, and make it no longer.
            return
        self._until_s = self._clock() + self._rest_s
        self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
        self._on_trial = False

    def abandon(self) -> None:
        """A request has ended without a verdict."""
        self._on_trial = False

    def _is_resting(self) -> bool:
        return self._on_trial or (self._until_s is not None and self._clock() < self._until_s)
