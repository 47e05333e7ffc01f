"""How far a ranking tells models apart: separability, the ranks that intervals leave open, and tests of pairs.

Invariant: everything here is about models of one tier, in any order. It ignores how intervals came about.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class PairTest(msgspec.Struct, frozen=True):
    """Two of M models by number. `difference`: first minus second, with its interval; `p_value`: two-sided."""

    first: int
    second: int
    difference: float
    low: float
    high: float
    p_value: float


def count_separated(low: Array, high: Array) -> tuple[int, int]:
    """Of M intervals: the pairs that do not overlap, and all pairs; of intervals that are not known (NaN) neither.

    Their quotient is the separability with confidence of Arena-Hard (Li et al. 2024, "From crowdsourced data to high-quality
    benchmarks", section 3). Intervals that only touch overlap.
    """
    import numpy as np

    models = int(np.isfinite(high - low).sum())
    return int((low[:, None] > high[None, :]).sum()), models * (models - 1) // 2


def bound_ranks(low: Array, high: Array) -> tuple[Array, Array]:
    """The best and the worst rank (from 1) of each of M models: only those above or below it for certain stand there."""
    above = (low[None, :] > high[:, None]).sum(axis=1)
    below = (high[None, :] < low[:, None]).sum(axis=1)
    return 1 + above, len(low) - below


def compare_resamples(point: Array, resamples: Array, level: float = 0.95) -> list[PairTest]:
    """A test of each pair from `resamples` (B, M) of `point` (M,): the percentile interval of the difference, and as p-value
    twice the share of resamples beyond 0, one counted more, (k + 1) / (B + 1) (Davison and Hinkley 1997, section 4.2).

    Sharper than whether two intervals overlap, as what both ratings have in common is gone. Not corrected for many pairs.
    """
    import numpy as np

    tails = [50 * (1 - level), 50 * (1 + level)]
    tests: list[PairTest] = []
    for first in range(len(point) - 1):
        difference = resamples[:, first : first + 1] - resamples[:, first + 1 :]
        low, high = np.percentile(difference, tails, axis=0)
        beyond = np.minimum((difference <= 0).sum(axis=0), (difference >= 0).sum(axis=0))
        p_value = np.minimum(1.0, 2 * (beyond + 1) / (len(resamples) + 1))
        for k, second in enumerate(range(first + 1, len(point))):
            gap = float(point[first] - point[second])
            tests.append(PairTest(first, second, gap, float(low[k]), float(high[k]), float(p_value[k])))
    return tests


def compare_estimates(point: Array, covariance: Array, level: float = 0.95) -> list[PairTest]:
    """A test of each pair by Wald, from the covariance (M, M) of `point`; without a spread (0, NaN) only a difference."""
    import numpy as np

    normal = NormalDist()
    z = normal.inv_cdf((1 + level) / 2)
    tests: list[PairTest] = []
    for first in range(len(point) - 1):
        for second in range(first + 1, len(point)):
            variance = covariance[first, first] + covariance[second, second] - 2 * covariance[first, second]
            gap, error = float(point[first] - point[second]), float(np.sqrt(variance)) if variance > 0 else np.nan
            p_value = 2 * normal.cdf(-abs(gap) / error)
            tests.append(PairTest(first, second, gap, gap - z * error, gap + z * error, p_value))
    return tests
