"""`fit_with_style`: Bradley–Terry strengths with the effect of style taken out.

P(left wins) = σ(θ_left − θ_right + Σ_k β_k x_k), where x_k is the relative difference in style k, divided by its standard
deviation over the battles (Li et al. 2024, "Does style matter? Disentangling style and substance in Chatbot Arena"). A tie is
half a win for each. β_k is what one standard deviation more of the style is worth, in log-odds.

Invariants: strengths have mean 0; intervals are sandwich ones, by question where battles have questions. It ignores tie models
and resamples: counts of equal battles are not enough here, and a resample would be a fit of all battles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.errors import DataError
from chaccu.rank.newton import damping, solve_step
from chaccu.rank.sandwich import join_sandwich, sum_squared_scores

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_STEPS, _TOLERANCE = 200, 1e-10


class StyledStrengths(msgspec.Struct, frozen=True):
    """`theta` (M,), `beta` (K,), and `covariance` (M + K, M + K) of both, in this order; NaN for fewer than two questions."""

    theta: Array
    beta: Array
    covariance: Array


def fit_with_style(
    left: Array, right: Array, share: Array, style: Array, *, models: int, question: Array | None = None
) -> StyledStrengths:
    """Strengths from N battles: numbers of models, the left one's `share` (1, 0.5, 0), `style` (N, K), numbers of questions.

    Raises `DataError` where a style never differs, or the search does not settle because style alone tells every winner.
    """
    import numpy as np

    spread = style.std(axis=0)
    if not spread.all():
        raise DataError(
            f"style {int(np.flatnonzero(spread == 0)[0]) + 1} of {len(spread)} is the same in every battle.",
            remedy="leave its columns out",
        )
    x = style / spread
    size = models + style.shape[1]
    found = np.zeros(size)
    for _ in range(_STEPS):
        odds = found[left] - found[right] + x @ found[models:]
        p = 0.5 + 0.5 * np.tanh(0.5 * odds)
        matrix = _information(left, right, x, p * (1 - p), models)
        step = solve_step(matrix, _add_up(left, right, x, share - p, models))
        change = np.abs(step[left] - step[right] + x @ step[models:]).max()
        found += step * damping(change)
        if change < _TOLERANCE:
            break
    else:
        raise DataError(
            f"the ratings of {models} models with {style.shape[1]} styles did not settle in {_STEPS} steps.",
            remedy="style alone may tell every winner: rank more battles, or without --style",
        )
    residual = share - p
    numbers = None if question is None else np.unique(question, return_inverse=True)[1]
    meat = sum_squared_scores(left, right, residual, residual[:, None] * x, models, numbers)
    independent = len(residual) if numbers is None else int(numbers.max()) + 1
    covariance = join_sandwich(matrix, meat, independent)
    return StyledStrengths(found[:models] - found[:models].mean(), found[models:], covariance)


def _add_up(left: Array, right: Array, x: Array, weight: Array, models: int) -> Array:
    import numpy as np

    strengths = np.bincount(left, weight, models) - np.bincount(right, weight, models)
    return np.concatenate([strengths, x.T @ weight])


def _information(left: Array, right: Array, x: Array, weight: Array, models: int) -> Array:
    import numpy as np

    size = models + x.shape[1]
    matrix = np.zeros((size, size))
    met = np.bincount(left * models + right, weight, models * models).reshape(models, models)
    met = met + met.T
    matrix[:models, :models] = np.diag(met.sum(axis=1)) - met + met.sum() / models**2
    for k in range(x.shape[1]):
        border = np.bincount(left, weight * x[:, k], models) - np.bincount(right, weight * x[:, k], models)
        matrix[:models, models + k] = matrix[models + k, :models] = border
    matrix[models:, models:] = x.T @ (x * weight[:, None])
    return matrix
