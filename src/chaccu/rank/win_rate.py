"""`measure_win_rate`: how often one model's answers are preferred to another's, and how sure that is.

A share is what a judge gave to the model of interest on one question: 1 for a win, 0.5 for a draw, 0 for a loss, anything
between for a judge that is not sure, and None where there is no verdict.

Invariants: counted + dropped = shares given, wins + losses + draws = counted; what is missing is dropped and counted, never
a loss. It ignores why an answer was preferred; for its length see `length_control`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

DRAW = 0.5


class WinRate(msgspec.Struct, frozen=True, kw_only=True):
    """Rates and errors as fractions of 1.

    `win_rate`: the mean share. `discrete_win_rate`: the same with each share rounded to a win, a draw or a loss.
    `standard_error`: None for fewer than two questions (or clusters). `low`, `high`: the interval of `win_rate`.
    """

    counted: int
    dropped: int
    wins: int
    losses: int
    draws: int
    win_rate: float
    discrete_win_rate: float
    standard_error: float | None
    low: float
    high: float


def measure_win_rate(
    shares: Sequence[float | None],
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> WinRate:
    """The win rate of N shares; `clusters` (N names, such as question ids) joins those that are not independent.

    The standard error is the sample's standard deviation over the root of its size, as AlpacaEval reports it, or with clusters
    the one of a mean of clustered observations (Miller 2024, "Adding error bars to evals", section 2.2) with the factor
    C / (C − 1) for C clusters. The interval is Wilson's (1927), with the number of independent wins and losses that would have
    this standard error in place of N (Korn and Graubard 1998), so that a model which won everything is not held to be certain.

    Raises `DataError` where no share is left, one is outside of 0 to 1, or the lengths differ.
    """
    import numpy as np

    values, groups = _take_present(shares, clusters)
    count = len(values)
    rate = float(values.mean())
    independent = count if groups is None else int(groups.max()) + 1
    error = _standard_error(values - rate, groups)
    low, high = wilson_interval(rate, _effective_count(rate, error, independent), level)
    wins, losses = int((values > DRAW).sum()), int((values < DRAW).sum())
    return WinRate(
        counted=count,
        dropped=len(shares) - count,
        wins=wins,
        losses=losses,
        draws=count - wins - losses,
        win_rate=rate,
        discrete_win_rate=float(np.where(values == DRAW, DRAW, values > DRAW).mean()),
        standard_error=error,
        low=low,
        high=high,
    )


def share_of_preference(preference: float | None) -> float | None:
    """The share of the second model, by AlpacaEval's preferences: 1 is the first's win, 2 the second's, 0 or 1.5 a draw.

    Raises `DataError` for another number.
    """
    if preference is None or math.isnan(preference):
        return None
    if preference == 0:
        return DRAW
    if not 1 <= preference <= 2:
        raise DataError(f"{preference} is no preference.", remedy="1 to 2, 0 for a draw, or null where there is no verdict")
    return float(preference) - 1


def preference_from_logprobs(logprobs: Mapping[str, float], token: str, other: str) -> float | None:
    """The probability of `token` where only `token` and `other` could have come, from the log-probabilities of a judge's token.

    A token that is not listed has none; None where neither is. This is the weighted preference of AlpacaEval 2: the judge
    names its choice by one token, and how sure it was becomes the share.
    """
    if token not in logprobs and other not in logprobs:
        return None
    difference = logprobs.get(other, -math.inf) - logprobs.get(token, -math.inf)
    return 0.0 if difference > 700 else 1 / (1 + math.exp(difference))


def read_shares(shares: Sequence[float | None]) -> Array:
    """(N,) shares, NaN for None. Raises `DataError` where none is there, or one is outside of 0 to 1."""
    import numpy as np

    values = np.array([math.nan if share is None else share for share in shares], dtype=np.float64)
    if np.isnan(values).all():
        raise DataError(f"of {len(shares)} comparisons none has a verdict.", remedy="judge at least one, then count again")
    outside = values[(values < 0) | (values > 1)]
    if outside.size:
        raise DataError(f"a share of {outside[0]:g} is outside of 0 to 1.", remedy="1 is a win, 0.5 a draw, 0 a loss")
    return values


def number_clusters(clusters: Sequence[Hashable] | None, present: Array) -> Array | None:
    """Of N clusters the numbers, from 0 and without a gap, of those that a mask (N,) chooses; None of no clusters."""
    import numpy as np

    if clusters is None:
        return None
    number: dict[Hashable, int] = {}
    kept = [cluster for cluster, there in zip(clusters, present.tolist(), strict=True) if there]
    return np.array([number.setdefault(cluster, len(number)) for cluster in kept])


def _take_present(shares: Sequence[float | None], clusters: Sequence[Hashable] | None) -> tuple[Array, Array | None]:
    import numpy as np

    if clusters is not None and len(clusters) != len(shares):
        raise DataError(f"{len(shares)} shares have {len(clusters)} clusters.", remedy="name one cluster for each share")
    values = read_shares(shares)
    present = ~np.isnan(values)
    return values[present], number_clusters(clusters, present)


def _standard_error(residuals: Array, groups: Array | None) -> float | None:
    """Of a mean, from the deviations; None where there is but one independent observation."""
    import numpy as np

    sums = residuals if groups is None else np.bincount(groups, weights=residuals)
    independent = len(sums)
    if independent < 2:
        return None
    return float(np.sqrt((sums**2).sum() * independent / (independent - 1)) / len(residuals))


def _effective_count(rate: float, error: float | None, independent: int) -> float:
    """How many independent wins and losses have this standard error; `independent` where the sample shows no spread."""
    # What rounding leaves of no spread at all (as where every cluster has one win in three) would claim to be certain.
    if error is None or error < 1e-9 or not 0 < rate < 1:
        return float(independent)
    return rate * (1 - rate) / error**2


def wilson_interval(rate: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Of a share `rate` of `count` independent trials.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference", equation for both ends.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
