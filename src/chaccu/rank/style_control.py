"""`fit_with_style`: Bradley–Terry strengths with the effect of style taken out.

P(left wins) = σ(θ_left − θ_right + Σ_k β_k x_k), where x_k is the relative difference in style k, divided by its standard
deviation over the battles (Li et al. 2024, "Does style matter? Disentangling style and substance in Chatbot Arena"). A tie is
half a win for each. β_k is what one standard deviation more of the style is worth, in log-odds.

Invariants: strengths have mean 0; a style is fitted only if it tells more than who answers and than the styles before it, as
no battles could tell its effect from theirs otherwise; errors are by question where battles have questions. It ignores tie
models: counts of equal battles are not enough here, so each fit, and each resample's, is one of all battles.
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
# Steps shrink quadratically: what is left after one as small as this is about a millionth.
_RESAMPLE_TOLERANCE = 1e-3
# The share of a style that neither models nor other styles tell; below this it is rounding.
_OWN_SHARE = 1e-9


class StyledBattles(msgspec.Struct, frozen=True, kw_only=True):
    """N battles of M `models`: their numbers, the left one's `share` (1, 0.5 or 0), and `x` (N, K) in standard deviations.

    `question` (N,): numbers of questions from 0 without a gap, or None.
    """

    left: Array
    right: Array
    share: Array
    x: Array
    models: int
    question: Array | None = None

    @property
    def independent(self) -> int:
        """How many independent observations there are: questions, where battles have some, else battles."""
        return len(self.share) if self.question is None else int(self.question.max()) + 1


class StyledStrengths(msgspec.Struct, frozen=True):
    """`theta` (M,), `beta` (K,), and `covariance` (M + K, M + K) of both, in this order; NaN for fewer than two questions."""

    theta: Array
    beta: Array
    covariance: Array


def take_styles(
    left: Array, right: Array, share: Array, style: Array, *, models: int, question: Array | None = None
) -> tuple[StyledBattles, Array]:
    """Battles with those of `style` (N, S) that can be told apart, and a mask (S,) of these. `question`: numbers or None."""
    import numpy as np

    told = np.ptp(style, axis=0) > 0
    x = style[:, told] / style[:, told].std(axis=0)
    own = _tell_apart(_information(left, right, x, np.ones(len(x)), models), models)
    told[told] = own
    numbers = None if question is None else np.unique(question, return_inverse=True)[1]
    return StyledBattles(left=left, right=right, share=share, x=x[:, own], models=models, question=numbers), told


def fit_with_style(battles: StyledBattles) -> StyledStrengths:
    """Strengths, effects and their sandwich covariance.

    Raises `DataError` where the search does not settle, as where style alone tells every winner.
    """
    import numpy as np

    models = battles.models
    start = np.zeros(models + battles.x.shape[1])
    found, matrix, residual = _search(battles, 1.0, start, _TOLERANCE)
    meat = sum_squared_scores(battles.left, battles.right, residual, residual[:, None] * battles.x, models, battles.question)
    covariance = join_sandwich(matrix, meat, battles.independent)
    return StyledStrengths(found[:models] - found[:models].mean(), found[models:], covariance)


def refit_with_style(battles: StyledBattles, point: StyledStrengths, weight: Array) -> Array:
    """Strengths and effects (M + K,) where battles count by their `weight` (N,), searched from `point`; none may be 0."""
    import numpy as np

    found, _, _ = _search(battles, weight, np.concatenate([point.theta, point.beta]), _RESAMPLE_TOLERANCE)
    found[: battles.models] -= found[: battles.models].mean()
    return found


def _search(battles: StyledBattles, weight: Array | float, start: Array, tolerance: float) -> tuple[Array, Array, Array]:
    """The maximum, and the information and the residuals (N,) beside it."""
    import numpy as np

    left, right, x, models = battles.left, battles.right, battles.x, battles.models
    found = start.copy()
    for _ in range(_STEPS):
        odds = found[left] - found[right] + x @ found[models:]
        p = 0.5 + 0.5 * np.tanh(0.5 * odds)
        residual = weight * (battles.share - p)
        matrix = _information(left, right, x, weight * p * (1 - p), models)
        step = solve_step(matrix, _add_up(left, right, x, residual, models))
        change = np.abs(step[left] - step[right] + x @ step[models:]).max()
        found += step * damping(change)
        if change < tolerance:
            return found, matrix, residual
    raise DataError(
        f"the ratings of {models} models with {x.shape[1]} styles did not settle in {_STEPS} steps.",
        remedy="style alone may tell every winner: rank more battles, or without --style",
    )


def _tell_apart(matrix: Array, models: int) -> Array:
    """A mask (K,) of the styles of which something is left when models, and styles before them, are taken out.

    `matrix` (M + K, M + K) is the information with equal weights, so that what is left is a residual sum of squares.
    """
    import numpy as np

    kept = list(range(models))
    for style in range(models, len(matrix)):
        border = matrix[kept, style]
        rest = matrix[style, style] - border @ np.linalg.solve(matrix[np.ix_(kept, kept)], border)
        if rest > _OWN_SHARE * matrix[style, style]:
            kept.append(style)
    return np.isin(np.arange(models, len(matrix)), kept)


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
