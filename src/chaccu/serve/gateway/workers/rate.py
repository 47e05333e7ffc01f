"""How fast workers are: `RateMeter` and `SpeedMeter`, on an injected clock; how long answers are: `AnswerLengths`."""

from __future__ import annotations

import math
from collections.abc import Callable


class RateMeter:
    """Events a second of the recent past. Weighs each event by its age; `window_s` is the age at which its weight has fallen to
    1/e."""

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


class SpeedMeter:
    """Tokens a second of one request while it is answered, its reading of the prompt included.

    Tokens over request-seconds (three requests for two seconds are six), both faded by the time that there was work: what was
    measured before a quiet night still holds in the morning.
    """

    def __init__(self, clock: Callable[[], float], window_s: float = 10.0) -> None:
        self._clock = clock
        self._window_s = window_s
        self._active = 0
        self._tokens = 0.0
        self._request_s = 0.0
        self._at_s = clock()

    def add(self, tokens: int) -> None:
        """Count tokens that were written now."""
        self._advance()
        self._tokens += tokens

    def set_active(self, requests: int) -> None:
        """From now on so many are answered at once."""
        self._advance()
        self._active = requests

    def measured(self) -> float | None:
        """Tokens a second of one request; None until a token has come in a time that can be measured."""
        self._advance()
        return self._tokens / self._request_s if self._tokens and self._request_s else None

    def estimate(self, prior: float) -> float:
        """The same from the first request on: as if there had been one request-second at the speed `prior` before."""
        self._advance()
        return (self._tokens + prior) / (self._request_s + 1)

    def _advance(self) -> None:
        now = self._clock()
        passed_s, self._at_s = now - self._at_s, now
        if self._active and passed_s > 0:
            kept = math.exp(-passed_s / self._window_s)
            self._tokens *= kept
            self._request_s = self._request_s * kept + self._active * passed_s


class AnswerLengths:
    """How many tokens answers have had lately, by model: the mean, each answer weighing 1/16 when it ends."""

    def __init__(self, unknown: float = 256.0) -> None:
        self._unknown = unknown
        self._means: dict[str, float] = {}

    def add(self, model: str, tokens: int) -> None:
        """An answer has ended with so many tokens."""
        mean = self._means.get(model)
        self._means[model] = tokens if mean is None else mean + (tokens - mean) / 16

    def expected(self, model: str, limit: int | None) -> float:
        """Tokens of an answer to come, that may have `limit` at most."""
        mean = self._means.get(model, self._unknown)
        return max(1.0, mean if limit is None else min(mean, limit))
