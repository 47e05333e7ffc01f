"""Newton's method for logistic likelihoods: the step, and how much of it to go.

Logistic likelihoods are generalised self-concordant: with ln(1 + ν) / ν of each step, where ν is the largest change of a
log-odds, every step goes up, from any start, and near the maximum it is the whole step (Sun and Tran-Dinh 2019, "Generalized
self-concordant functions: a recipe for Newton-type methods", section 3). It ignores the likelihood itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chaccu.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def damping(change: Array) -> Array:
    """The part of the step to go where it changes some log-odds by as much as `change`, from 0 on; element by element."""
    import numpy as np

    return np.asarray(np.log1p(change) / np.maximum(change, 1e-300))


def solve_step(matrix: Array, gradient: Array) -> Array:
    """Steps (…, K) from negated second derivatives (…, K, K) and gradients (…, K).

    Raises `DataError` where the likelihood is flat in some direction, so that it has no one maximum.
    """
    import numpy as np

    try:
        return np.asarray(np.linalg.solve(matrix, gradient[..., None])[..., 0])
    except np.linalg.LinAlgError as error:
        raise DataError(
            "ratings have no finite value: what they depend on tells every winner, or nothing.",
            remedy="rank more battles, or by fewer things: without --style, with ties as half a win",
        ) from error
