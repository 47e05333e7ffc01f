"""`estimate_share`, `estimate_ratio`: a figure over many questions, with an interval; `sign_test_low`, its exact lower end.

Answers to one question are alike, so whole questions are drawn: a bootstrap by question (Efron 1979; Miller 2024, "Adding error
bars to evals", section 2.2), seeded, so that equal data give equal numbers. A bootstrap of few questions is too sure of itself,
and one of questions that all say the same has no width: a share takes the wider of it and Wilson's interval at each end, a mean
or ratio has the bootstrap's ends drawn out as Student's t asks (Hesterberg 2015, "What teachers should know about the
bootstrap", on expanded percentile intervals).

Invariants: what is missing (None) is in no figure; without data there is no figure. It ignores what the figures mean.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.rank import measure_win_rate

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

RESAMPLES = 1000
LEVEL = 0.95
_KEPT_QUESTIONS, _BLOCKS = 2000, 50


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
    found = _resample(values, [1.0] * len(values), groups, level, seed)
    wilson = measure_win_rate(values, clusters=groups, level=level)
    low = wilson.low if found.low is None else min(found.low, wilson.low)
    high = wilson.high if found.high is None else max(found.high, wilson.high)
    return msgspec.structs.replace(found, low=low, high=high)


def sign_test_low(shares: Sequence[float], questions: Sequence[Hashable], *, level: float = LEVEL) -> float:
    """The lower end of a mean share that an exact sign test by question leaves open.

    A question whose shares come to more than one half on average is won, to less lost, else tied. Ties keep their half, and of
    the others the lower end of the won part is Clopper and Pearson's (1934, "The use of confidence or fiducial limits"), at the
    same two-sided level. So this is over 0.5 only where a sign test (Dixon and Mood 1946) finds more wins than chance.
    """
    sums: dict[Hashable, float] = defaultdict(float)
    for share, question in zip(shares, questions, strict=True):
        sums[question] += share - 0.5
    won, lost = sum(one > 0 for one in sums.values()), sum(one < 0 for one in sums.values())
    if not won + lost:
        return 0.5 if sums else 0.0
    ties = 1 - (won + lost) / len(sums)
    return 0.5 * ties + (1 - ties) * _clopper_pearson_low(won, won + lost, level)


def _clopper_pearson_low(won: int, of: int, level: float) -> float:
    """The largest p at which `won` or more of `of` have a chance of at most (1 − level) / 2."""
    import numpy as np

    if not won:
        return 0.0
    wins = np.arange(won, of + 1)
    ways = np.array([math.lgamma(of + 1) - math.lgamma(one + 1) - math.lgamma(of - one + 1) for one in range(won, of + 1)])
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        chance = np.exp(ways + wins * math.log(p) + (of - wins) * math.log1p(-p)).sum()
        low, high = (p, high) if chance <= (1 - level) / 2 else (low, p)
    return low


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
    count = len(set(questions))
    return _resample(above, below, questions, _draw_out(level, count) if count > 1 else level, seed)


def _draw_out(level: float, questions: int) -> float:
    """The level at which a bootstrap over so few questions has the ends that `level` should have.

    Its width falls short by Student's quantile over the normal one, and by the root of n / (n − 1).
    """
    normal = NormalDist()
    wider = _student_quantile((1 + level) / 2, questions - 1) * math.sqrt(questions / (questions - 1))
    return 2 * normal.cdf(wider) - 1


def _student_quantile(p: float, freedom: int) -> float:
    """Of Student's t: exact for one and two degrees of freedom, else Abramowitz and Stegun 1964, 26.7.5 (within 1 %)."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * freedom**4)
    )


def _resample(
    above: Sequence[float], below: Sequence[float], questions: Sequence[Hashable], level: float, seed: int
) -> Estimate:
    """The ratio, with the ends of the bootstrap at `level` as they are."""
    import numpy as np

    number: dict[Hashable, int] = {}
    groups = np.array([number.setdefault(question, len(number)) for question in questions], dtype=np.int64)
    bottom = float(sum(below))
    if not bottom:
        return Estimate(n=len(groups), questions=len(number))
    value = float(sum(above)) / bottom
    if len(number) < 2:
        return Estimate(n=len(groups), questions=len(number), value=value)
    sums = np.stack([np.bincount(groups, weights=np.asarray(part, dtype=np.float64)) for part in (above, below)], axis=1)
    tops, bottoms = np.concatenate([drawn @ sums for drawn in _draw_blocks(len(number), seed)]).T
    ratios = tops[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(n=len(groups), questions=len(number), value=value, low=float(low), high=float(high))


def _draw_blocks(questions: int, seed: int) -> Iterator[Array]:
    """How often each question comes in each resample; blocks of resamples × `questions`, so that many questions take no more
    memory than few."""
    if questions <= _KEPT_QUESTIONS:
        yield _draw(questions, seed)
        return
    import numpy as np

    generator, even = np.random.default_rng(seed), np.full(questions, 1 / questions)
    for _ in range(_BLOCKS):
        yield generator.multinomial(questions, even, size=RESAMPLES // _BLOCKS).astype(np.float64)


@lru_cache(maxsize=8)
def _draw(questions: int, seed: int) -> Array:
    """All of them, `RESAMPLES` × `questions`: a report asks for the same few sizes again and again."""
    import numpy as np

    even = np.full(questions, 1 / questions)
    return np.random.default_rng(seed).multinomial(questions, even, size=RESAMPLES).astype(np.float64)
