"""`damping`: how much of a Newton step to go.

Logistic likelihoods are generalised self-concordant: with ln(1 + ν) / ν of each step, where ν is the largest change of a
log-odds, every step goes up, from any start, and near the maximum it is the whole step (Sun and Tran-Dinh 2019, "Generalized
self-concordant functions: a recipe for Newton-type methods", section 3). It ignores the likelihood itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def damping(change: Array) -> Array:
    """The part of the step to go where it changes some log-odds by as much as `change`, from 0 on; element by element."""
    import numpy as np

    return np.asarray(np.log1p(change) / np.maximum(change, 1e-300))
