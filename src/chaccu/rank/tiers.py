"""`rate_tier`: ratings, errors and intervals of the models of one tier.

Invariants: the mean rating is 1000, and 400 points are odds of 10 to 1; intervals are the middle 95 %. It ignores other tiers,
names, and the order of battles.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.rank.battles import TIE, Battles
from chaccu.rank.bootstrap import resample_strengths
from chaccu.rank.cells import Cells
from chaccu.rank.outcome_model import OutcomeModel, first_eta
from chaccu.rank.sandwich import sandwich_covariance
from chaccu.rank.separation import PairTest, bound_ranks, compare_estimates, compare_resamples, count_separated
from chaccu.rank.strengths import Strengths, fit_strengths, pair_counts
from chaccu.rank.style_control import fit_with_style

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MEAN, SCALE = 1000.0, 400.0
_POINTS = SCALE / math.log(10)
# Steps shrink quadratically: one below this leaves an error of rounding only.
_TOLERANCE = 1e-8
_Z = NormalDist().inv_cdf(0.975)


class TierRating(msgspec.Struct, frozen=True, kw_only=True):
    """Of M models, in the order of the tier: arrays (M,) of ratings and standard errors; `low`, `high`, `best`, `worst` (of
    intervals and ranks) are None without intervals. `separated` of `pairs` pairs have intervals that do not overlap. `effects`:
    (K, 3), estimate and interval of each style's effect in log-odds, NaN for a style that never differs."""

    rating: Array
    error: Array
    low: Array | None = None
    high: Array | None = None
    best: Array | None = None
    worst: Array | None = None
    separated: int = 0
    pairs: int = 0
    tests: list[PairTest] = []
    effects: Array | None = None


def rate_tier(
    cells: Cells, models: int, *, model: OutcomeModel, bootstraps: int, rng: np.random.Generator, with_tests: bool
) -> TierRating:
    """Ratings of models 0 to `models` − 1 by the battles in `cells`; intervals by `bootstraps` resamples, or by sandwich errors
    where that is 0. Resamples and errors are by question where `cells` has questions."""
    import numpy as np

    point = _fit_point(cells, models, model)
    covariance = sandwich_covariance(model, cells, point)
    if not bootstraps:
        return rate_by_errors(point.theta[0], covariance, with_tests=with_tests)
    ratings = _to_points(point.theta[0])
    resamples = _to_points(resample_strengths(model, cells, point, bootstraps, rng))
    low, high = np.percentile(resamples, [2.5, 97.5], axis=0)
    tests = compare_resamples(ratings, resamples) if with_tests else []
    return _with_ranks(ratings, _POINTS * np.sqrt(np.diag(covariance)), low, high, tests)


def rate_with_style(battles: Battles, tier: list[int], *, with_tests: bool) -> TierRating:
    """Ratings of the models of `tier`, in this order, with the effect of style taken out, by the battles among them."""
    import numpy as np

    assert battles.style is not None
    place = np.full(len(battles.models), -1)
    place[tier] = np.arange(len(tier))
    among = (place[battles.left] >= 0) & (place[battles.right] >= 0)
    style = battles.style[among]
    varies = style.std(axis=0) > 0
    fitted = fit_with_style(
        place[battles.left[among]],
        place[battles.right[among]],
        1 - battles.outcome[among] / 2,
        style[:, varies],
        models=len(tier),
        question=None if battles.question is None else battles.question[among],
    )
    rated = rate_by_errors(fitted.theta, fitted.covariance[: len(tier), : len(tier)], with_tests=with_tests)
    errors = np.sqrt(np.diag(fitted.covariance)[len(tier) :])
    effects = np.full((len(varies), 3), np.nan)
    effects[varies] = np.stack([fitted.beta, fitted.beta - _Z * errors, fitted.beta + _Z * errors], axis=1)
    return msgspec.structs.replace(rated, effects=effects)


def rate_by_errors(theta: Array, covariance: Array, *, with_tests: bool) -> TierRating:
    """Ratings of strengths whose covariance (M, M) is known, with normal intervals."""
    import numpy as np

    ratings, error = _to_points(theta), _POINTS * np.sqrt(np.diag(covariance))
    tests = compare_estimates(ratings, _POINTS**2 * covariance) if with_tests else []
    return _with_ranks(ratings, error, ratings - _Z * error, ratings + _Z * error, tests)


def without_intervals(cells: Cells, models: int, model: OutcomeModel) -> TierRating:
    """Ratings and standard errors alone."""
    import numpy as np

    point = _fit_point(cells, models, model)
    error = _POINTS * np.sqrt(np.diag(sandwich_covariance(model, cells, point)))
    return TierRating(rating=_to_points(point.theta[0]), error=error)


def _fit_point(cells: Cells, models: int, model: OutcomeModel) -> Strengths:
    import numpy as np

    pairs = pair_counts(cells, cells.count[None, :].astype(np.float64))
    eta = first_eta(model, float(cells.count[cells.outcome == TIE].sum()), float(cells.count.sum()))
    return fit_strengths(model, pairs, np.zeros(models), eta, tolerance=_TOLERANCE)


def _to_points(theta: Array) -> Array:
    import numpy as np

    return np.asarray(MEAN + _POINTS * theta)


def _with_ranks(rating: Array, error: Array, low: Array, high: Array, tests: list[PairTest]) -> TierRating:
    best, worst = bound_ranks(low, high)
    separated, pairs = count_separated(low, high)
    return TierRating(
        rating=rating,
        error=error,
        low=low,
        high=high,
        best=best,
        worst=worst,
        separated=separated,
        pairs=pairs,
        tests=tests,
    )
