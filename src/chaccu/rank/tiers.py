"""`rate_tier`, `rate_with_style`: ratings, errors and intervals of the models of one tier.

Invariants: the mean rating is 1000, and 400 points are odds of 10 to 1; intervals are the middle 95 %. It ignores other tiers,
names, and the order of battles.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.rank.battles import TIE, Battles
from chaccu.rank.bootstrap import resample_strengths, resample_with_style
from chaccu.rank.cells import Cells
from chaccu.rank.outcome_model import OutcomeModel, first_eta
from chaccu.rank.sandwich import sandwich_covariance
from chaccu.rank.separation import PairTest, bound_ranks, compare_estimates, compare_resamples, count_separated
from chaccu.rank.strengths import fit_strengths, pair_counts
from chaccu.rank.style_control import fit_with_style, take_styles

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MEAN, SCALE = 1000.0, 400.0
_POINTS = SCALE / math.log(10)
# Steps shrink quadratically: one below this leaves an error of rounding only.
_TOLERANCE = 1e-8
# In points: what rounding leaves of no error at all.
_NO_SPREAD = 1e-6
_Z = NormalDist().inv_cdf(0.975)


class TierRating(msgspec.Struct, frozen=True, kw_only=True):
    """Of M models, in the order of the tier: arrays (M,) of ratings and standard errors; `low`, `high`, `best`, `worst` (of
    intervals and ranks) are None without intervals. `separated` of `pairs` pairs have intervals that do not overlap. `effects`:
    (K, 3), estimate and interval of each style's effect in log-odds, NaN for a style that cannot be told apart."""

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


class IntervalPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How intervals are found: from `bootstraps` resamples by `rng`, from sandwich errors where that is None, or not at all
    where it is 0. `with_tests`: pairs are tested too, by sandwich errors where nothing is resampled."""

    bootstraps: int | None
    rng: np.random.Generator
    with_tests: bool = False

    def resamples(self, independent: int) -> int:
        """How many to draw of so many independent observations: of one alone, which tells no error, none."""
        return (self.bootstraps or 0) if independent > 1 else 0


def rate_tier(cells: Cells, models: int, *, model: OutcomeModel, plan: IntervalPlan) -> TierRating:
    """Ratings of models 0 to `models` − 1 by the battles in `cells`; intervals are by question where `cells` has questions."""
    import numpy as np

    pairs = pair_counts(cells, cells.count[None, :].astype(np.float64))
    eta = first_eta(model, float(cells.count[cells.outcome == TIE].sum()), float(cells.count.sum()))
    point = fit_strengths(model, pairs, np.zeros(models), eta, tolerance=_TOLERANCE)
    covariance = sandwich_covariance(model, cells, point)
    count = plan.resamples(cells.independent)
    drawn = resample_strengths(model, cells, point, count, plan.rng) if count else None
    return _rate(point.theta[0], covariance, drawn, plan)


def rate_with_style(battles: Battles, tier: list[int], *, plan: IntervalPlan) -> TierRating:
    """Ratings of the models of `tier`, in this order, with the effect of style taken out, by the battles among them."""
    import numpy as np

    assert battles.style is not None
    place = np.full(len(battles.models), -1)
    place[tier] = np.arange(len(tier))
    among = (place[battles.left] >= 0) & (place[battles.right] >= 0)
    styled, told = take_styles(
        place[battles.left[among]],
        place[battles.right[among]],
        1 - battles.outcome[among] / 2,
        battles.style[among],
        models=len(tier),
        question=None if battles.question is None else battles.question[among],
    )
    fitted, models = fit_with_style(styled), len(tier)
    count = plan.resamples(styled.independent)
    drawn = resample_with_style(styled, fitted, count, plan.rng) if count else None
    rated = _rate(fitted.theta, fitted.covariance[:models, :models], None if drawn is None else drawn[:, :models], plan)
    effects = np.full((len(told), 3), np.nan)
    effects[told, 0] = fitted.beta
    if plan.bootstraps != 0:
        errors = np.sqrt(np.diag(fitted.covariance)[models:])
        effects[told, 1:] = np.stack(_bounds(fitted.beta, errors, None if drawn is None else drawn[:, models:]), axis=1)
    return msgspec.structs.replace(rated, effects=effects)


def _rate(theta: Array, covariance: Array, drawn: Array | None, plan: IntervalPlan) -> TierRating:
    """Ratings of strengths (M,) with their covariance (M, M), and resamples (B, M) of them where there are some."""
    import numpy as np

    rating, error = _to_points(theta), _POINTS * np.sqrt(np.diag(covariance))
    if (error < _NO_SPREAD).all():
        # Two ties, or a flip on each question: no battle differs from what is expected of it, and nothing tells the error.
        error, covariance, drawn = np.full_like(error, np.nan), np.full_like(covariance, np.nan), None
    resamples = None if drawn is None else _to_points(drawn)
    tests: list[PairTest] = []
    if plan.with_tests and resamples is not None:
        tests = compare_resamples(rating, resamples)
    elif plan.with_tests:
        tests = compare_estimates(rating, _POINTS**2 * covariance)
    if plan.bootstraps == 0:
        return TierRating(rating=rating, error=error, tests=tests)
    low, high = _bounds(rating, error, resamples)
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


def _bounds(point: Array, error: Array, resamples: Array | None) -> tuple[Array, Array]:
    """Both ends of the 95 % intervals of `point` (M,): of `resamples` (B, M) the middle, else the normal ones."""
    import numpy as np

    if resamples is None:
        return point - _Z * error, point + _Z * error
    low, high = np.percentile(resamples, [2.5, 97.5], axis=0)
    return low, high


def _to_points(theta: Array) -> Array:
    import numpy as np

    return np.asarray(MEAN + _POINTS * theta)
