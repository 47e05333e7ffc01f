"""`control_length`: the win rate that a model would have if its answers were as long as the other's.

The length-controlled win rate of AlpacaEval 2 (Dubois et al. 2024, "Length-controlled AlpacaEval: a simple way to debias
automatic evaluators", section 3): a logistic model of the share that a model gets on a question,

    σ(θ + φ tanh((l_other − l_model) / s) + ψ γ_question),

with characters l, the standard deviation s of their difference, and the question's difficulty γ, known beforehand; the
win rate is the mean over questions with the length term taken out. The published one also holds φ near that of its baseline's
own longer and shorter answers; those are not asked for here, and a small ridge keeps coefficients finite instead.

Invariants: counted + dropped = shares given. It ignores style other than length.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.errors import DataError
from chaccu.rank.newton import damping, solve_step
from chaccu.rank.sandwich import join_sandwich
from chaccu.rank.win_rate import number_clusters, read_shares

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

RIDGE = 0.1
_STEPS, _TOLERANCE = 200, 1e-10
_LEVEL = 0.95


class LengthControlled(msgspec.Struct, frozen=True, kw_only=True):
    """Rates and errors as fractions of 1; coefficients in log-odds.

    `win_rate`: with equal lengths; `standard_error` by the delta method from the sandwich covariance or from the model's own,
    whichever is larger; `low` and `high` its 95 % interval, formed on log-odds; these are None for fewer than two questions (or
    clusters). `model`: θ; `length`: φ, below 0 where longer answers are preferred; `difficulty`: ψ, None without difficulties.
    """

    counted: int
    dropped: int
    win_rate: float
    standard_error: float | None
    low: float | None
    high: float | None
    model: float
    length: float
    difficulty: float | None


def control_length(
    shares: Sequence[float | None],
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    difficulties: Sequence[float] | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    ridge: float = RIDGE,
) -> LengthControlled:
    """The length-controlled win rate of N shares, with the lengths of the model's answers and of the other's.

    `shares` are as in `win_rate`; `difficulties` (N,) in any unit, larger where the model of interest does better. `clusters`
    (N names, such as question ids) joins shares that are not independent: their scores are added up for the error. `ridge` is
    the weight of half the squared coefficients against the log-likelihood. Raises `DataError` where arrays differ in length,
    none has a verdict, a share is outside of 0 to 1, or a length or difficulty is no finite number.
    """
    import numpy as np

    columns = [shares, lengths, other_lengths, *(column for column in (difficulties, clusters) if column is not None)]
    if len({len(column) for column in columns}) > 1:
        raise DataError(
            f"columns differ in length: {', '.join(str(len(column)) for column in columns)}.", remedy="one of each a share"
        )
    y = read_shares(shares)
    gap = np.asarray(other_lengths, dtype=np.float64) - np.asarray(lengths, dtype=np.float64)
    level = None if difficulties is None else np.asarray(difficulties, dtype=np.float64)
    if not np.isfinite(gap).all() or (level is not None and not np.isfinite(level).all()):
        raise DataError("a length or a difficulty is no finite number.", remedy="leave out the questions that have none")
    present = ~np.isnan(y)
    spread = float(gap.std(ddof=1)) if len(gap) > 1 else 0.0
    length_term = np.tanh(gap / spread) if spread else np.zeros_like(gap)
    without = np.ones((len(y), 1)) if level is None else np.stack([np.ones(len(y)), level], axis=1)
    x = np.concatenate([without, length_term[:, None]], axis=1)
    found, covariances = _fit(x[present], y[present], number_clusters(clusters, present), ridge)
    rate, error, low, high = _predict(without, found[:-1], [covariance[:-1, :-1] for covariance in covariances])
    return LengthControlled(
        counted=int(present.sum()),
        dropped=int((~present).sum()),
        win_rate=rate,
        standard_error=error,
        low=low,
        high=high,
        model=float(found[0]),
        length=float(found[-1]),
        difficulty=None if level is None else float(found[1]),
    )


def _fit(x: Array, y: Array, groups: Array | None, ridge: float) -> tuple[Array, list[Array]]:
    """Coefficients (K,) of a logistic model by Newton's method, their sandwich covariance, by groups (N,) from 0 if any, and
    the model's own."""
    import numpy as np

    found = np.zeros(x.shape[1])
    penalty = ridge * np.eye(x.shape[1])
    for _ in range(_STEPS):
        p = _sigmoid(x @ found)
        matrix = (x * (p * (1 - p))[:, None]).T @ x + penalty
        step = solve_step(matrix, x.T @ (y - p) - penalty @ found)
        change = np.abs(x @ step).max()
        found += step * damping(change)
        if change < _TOLERANCE:
            scores = x * (y - p)[:, None]
            if groups is not None:
                scores = np.stack([np.bincount(groups, weights=column) for column in scores.T], axis=1)
            return found, [join_sandwich(matrix, scores.T @ scores, len(scores)), np.linalg.inv(matrix)]
    raise DataError(
        f"the length-controlled win rate of {len(y)} comparisons did not settle in {_STEPS} steps.",
        remedy="a larger ridge, or difficulties of a smaller scale",
    )


def _predict(x: Array, found: Array, covariances: list[Array]) -> tuple[float, float | None, float | None, float | None]:
    """The mean of σ(x · found), its standard error and both ends of its interval; None where a covariance is NaN.

    Where all was won, or length tells every winner, residuals are next to nothing and a sandwich is certain of everything: the
    model's own covariance, which has no residuals, is not.
    """
    import numpy as np

    p = _sigmoid(x @ found)
    rate = float(p.mean())
    slope = (x * (p * (1 - p))[:, None]).mean(axis=0)
    variance = float(np.max([slope @ covariance @ slope for covariance in covariances]))
    if math.isnan(variance):
        return rate, None, None, None
    error = math.sqrt(max(0.0, variance))
    odds, half = math.log(rate / (1 - rate)), NormalDist().inv_cdf((1 + _LEVEL) / 2) * error / (rate * (1 - rate))
    return rate, error, 1 / (1 + math.exp(half - odds)), 1 / (1 + math.exp(-odds - half))


def _sigmoid(x: Array) -> Array:
    import numpy as np

    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x))
