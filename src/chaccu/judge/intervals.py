"""`estimate_share`, `estimate_ratio`: a figure over many questions, with an interval.

Answers to one question are alike, so whole questions are drawn: a bootstrap by question (Efron 1979; Miller 2024, "Adding error
bars to evals", section 2.2), seeded, so that equal data give equal numbers. A bootstrap of few questions is too sure of itself,
and one of questions that all say the same has no width: a share takes the wider of it and Wilson's interval at each end.

Invariants: what is missing (None) is in no figure; without data there is no figure. It ignores what the figures mean.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.rank import measure_win_rate

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

RESAMPLES = 1000
LEVEL = 0.95


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """`value` over `n` observations on `questions` questions; None where there are none. `low`, `high`: None if unknown."""

    n: int
    questions: int
    value: float | None = None
    low: float | None = None
    high: float | None = None


def estimate_share(
    shares: Sequence[float | None], questions: Sequence[Hashable], *, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """The mean of shares from 0 to 1, with the wider of the bootstrap's and Wilson's ends (`measure_win_rate`)."""
    kept = [(share, question) for share, question in zip(shares, questions, strict=True) if share is not None]
    if not kept:
        return Estimate(n=0, questions=0)
    values, groups = [share for share, _ in kept], [question for _, question in kept]
    found = estimate_ratio(values, [1.0] * len(values), groups, level=level, seed=seed)
    wilson = measure_win_rate(values, clusters=groups, level=level)
    low = wilson.low if found.low is None else min(found.low, wilson.low)
    high = wilson.high if found.high is None else max(found.high, wilson.high)
    return msgspec.structs.replace(found, low=low, high=high)


def estimate_mean(
    values: Sequence[float | None], questions: Sequence[Hashable], *, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """The mean of numbers; no interval with fewer than two questions."""
    kept = [(value, question) for value, question in zip(values, questions, strict=True) if value is not None]
    groups = [question for _, question in kept]
    return estimate_ratio([value for value, _ in kept], [1.0] * len(kept), groups, level=level, seed=seed)


def estimate_ratio(
    above: Sequence[float], below: Sequence[float], questions: Sequence[Hashable], *, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """Sum of `above` over sum of `below`; None where that is 0, no interval with fewer than two questions."""
    import numpy as np

    number: dict[Hashable, int] = {}
    groups = np.array([number.setdefault(question, len(number)) for question in questions], dtype=np.int64)
    bottom = float(sum(below))
    if not bottom:
        return Estimate(n=len(groups), questions=len(number))
    value = float(sum(above)) / bottom
    if len(number) < 2:
        return Estimate(n=len(groups), questions=len(number), value=value)
    drawn = _draw(len(number), seed)
    tops = drawn @ np.bincount(groups, weights=np.asarray(above, dtype=np.float64))
    bottoms = drawn @ np.bincount(groups, weights=np.asarray(below, dtype=np.float64))
    ratios = tops[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(n=len(groups), questions=len(number), value=value, low=float(low), high=float(high))


@lru_cache(maxsize=8)
def _draw(questions: int, seed: int) -> Array:
    """How often each question comes in each resample; `RESAMPLES` × `questions`."""
    import numpy as np

    return np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), size=RESAMPLES)
