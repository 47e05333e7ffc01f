"""`Hedging`: when an answer that has not begun is asked of a second worker too.

After the time in which 95 of 100 answers of this model had begun lately, and never before `least_s`, a second worker may be
asked; the first text wins (Dean and Barroso, "The Tail at Scale", 2013). Pure policy on an injected clock. Invariant: of any
run of requests for a model no more than the share `share` is asked twice, for each request earns that much of a second one and
ten at most are saved up. It ignores which worker is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_SAMPLES = 200
_LEAST_SAMPLES = 20
_QUANTILE = 0.95
_MOST_SAVED = 10.0


class _Model:
    """What has been seen of one model."""

    def __init__(self) -> None:
        self.first_text_s: deque[float] = deque(maxlen=_SAMPLES)
        self.saved = 0.0
        self.usual_s: float | None = None
        self._since = 0

    def add(self, seconds: float) -> None:
        self.first_text_s.append(seconds)
        self._since += 1
        if len(self.first_text_s) >= _LEAST_SAMPLES and (self.usual_s is None or self._since >= _LEAST_SAMPLES):
            self._since = 0
            self.usual_s = sorted(self.first_text_s)[int(_QUANTILE * len(self.first_text_s))]


class Hedging:
    """The hedging of one gateway."""

    def __init__(self, clock: Callable[[], float], *, share: float = 0.05, least_s: float = 1.0) -> None:
        self._clock = clock
        self._share = share
        self._least_s = least_s
        self._models: dict[str, _Model] = {}

    def begin(self, model: str) -> FirstTextWait:
        """A worker of `model` has been given a request."""
        seen = self._models.get(model)
        if seen is None:
            seen = self._models[model] = _Model()
        seen.saved = min(_MOST_SAVED, seen.saved + self._share)
        after_s = None if seen.usual_s is None else max(self._least_s, seen.usual_s)
        return FirstTextWait(seen, self._clock, after_s)


class FirstTextWait:
    """One request's wait for its first text. `after_s`: when a second worker may be asked; None: never."""

    def __init__(self, seen: _Model, clock: Callable[[], float], after_s: float | None) -> None:
        self.after_s = after_s
        self._seen = seen
        self._clock = clock
        self._began_s = clock()

    @property
    def may_hedge(self) -> bool:
        """Whether a second request has been earned."""
        return self._seen.saved >= 1

    def hedge(self) -> None:
        """A second worker is asked."""
        self._seen.saved -= 1

    def end(self) -> None:
        """The first text has come."""
        self._seen.add(self._clock() - self._began_s)
