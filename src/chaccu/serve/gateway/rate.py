"""`RateMeter`: events a second of the recent past, on an injected clock."""

from __future__ import annotations

import math
from collections.abc import Callable


class RateMeter:
    """Weighs each event by its age; `window_s` is the age at which its weight has fallen to 1/e."""

    def __init__(self, clock: Callable[[], float], window_s: float = 5.0) -> None:
        self._clock = clock
        self._window_s = window_s
        self._sum = 0.0
        self._began_s = self._at_s = clock()

    def add(self, count: int) -> None:
        """Count `count` events that happened now."""
        self._fade()
        self._sum += count

    def per_second(self) -> float:
        """Events a second; right from the start, because the weights are divided by the time there has been."""
        self._fade()
        seen = 1 - math.exp(-max(self._at_s - self._began_s, 0.1) / self._window_s)
        return self._sum / (self._window_s * seen)

    def _fade(self) -> None:
        now = self._clock()
        self._sum *= math.exp(-(now - self._at_s) / self._window_s)
        self._at_s = now
