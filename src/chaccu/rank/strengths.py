"""`fit_strengths`: the maximum-likelihood strengths of M models, for many sets of counts at once.

Newton's method in numpy, over all resamples of a batch together, until each has settled.

Invariants: strengths are natural logarithms of odds, their mean is 0. It ignores where counts come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.errors import DataError
from chaccu.rank.battles import LEFT_WINS, RIGHT_WINS, TIE
from chaccu.rank.cells import Cells
from chaccu.rank.newton import damping, solve_step
from chaccu.rank.outcome_model import OutcomeModel, Slopes, slopes

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_STEPS = 200
_SMALLEST_ETA = 1e-4


class PairCounts(msgspec.Struct, frozen=True):
    """What B resamples hold of each of P pairs that met: arrays (B, P) of wins and losses of the left one, and of ties."""

    left: Array
    right: Array
    won: Array
    lost: Array
    tied: Array

    def rows(self, chosen: Array) -> PairCounts:
        return PairCounts(self.left, self.right, self.won[chosen], self.lost[chosen], self.tied[chosen])


class Strengths(msgspec.Struct, frozen=True):
    """`theta`: (B, M), the mean of a row is 0; `eta`: (B,), None for a model without a tie parameter."""

    theta: Array
    eta: Array | None


def pair_counts(cells: Cells, counts: Array) -> PairCounts:
    """Counts (B, C) of cells as counts of pairs."""
    import numpy as np

    width = int(cells.right.max()) + 1
    keys, pair = np.unique(cells.left * width + cells.right, return_inverse=True)

    def spread(outcome: int) -> Array:
        of_pairs = np.zeros((len(counts), len(keys)))
        chosen = cells.outcome == outcome
        of_pairs[:, pair[chosen]] = counts[:, chosen]
        return of_pairs

    return PairCounts(keys // width, keys % width, spread(LEFT_WINS), spread(RIGHT_WINS), spread(TIE))


def fit_strengths(model: OutcomeModel, pairs: PairCounts, theta: Array, eta: float | None, *, tolerance: float) -> Strengths:
    """Strengths for each of B rows of counts, searched from `theta` (M,) and `eta` until no distance changes by `tolerance`.

    Raises `DataError` where the search does not settle, as for models between which the likelihood has no maximum.
    """
    import numpy as np

    batch = len(pairs.won)
    found = np.tile(theta - theta.mean(), (batch, 1))
    etas = None if eta is None else np.full(batch, eta)
    active = np.arange(batch)
    for _ in range(_STEPS):
        own = pairs if len(active) == batch else pairs.rows(active)
        here = found[active]
        d = here[:, pairs.left] - here[:, pairs.right]
        own_eta = None if etas is None else etas[active]
        there = slopes(model, own.won, own.lost, own.tied, d, None if own_eta is None else own_eta[:, None])
        step, eta_step = _newton_step(pairs, there, here.shape[1])
        change = np.ptp(step, axis=1)
        if eta_step is not None:
            change = np.maximum(change, np.abs(eta_step))
        part = damping(change)
        found[active] = here + step * part[:, None]
        if etas is not None and own_eta is not None and eta_step is not None:
            moved = own_eta + eta_step * part
            etas[active] = np.maximum(moved, np.maximum(own_eta / 10, _SMALLEST_ETA)) if model == "rao_kupper" else moved
        active = active[~(change < tolerance)]
        if not active.size:
            return Strengths(found - found.mean(axis=1, keepdims=True), etas)
    raise DataError(
        f"the ratings of {found.shape[1]} models did not settle in {_STEPS} steps ({active.size} of {batch} fits).",
        remedy="rank with ties as half a win, or take out models with very few battles",
    )


def information(pairs: PairCounts, there: Slopes, models: int) -> Array:
    """The negated second derivatives by M strengths and, last, η: (B, M or M + 1, the same). Singular along equal strengths."""
    import numpy as np

    batch = len(there.by_dd)
    size = models + (there.by_eta is not None)
    matrix = np.zeros((batch, size, size))
    matrix[:, pairs.left, pairs.right] = -there.by_dd
    matrix[:, pairs.right, pairs.left] = -there.by_dd
    diagonal = np.arange(models)
    matrix[:, diagonal, diagonal] = -matrix[:, :models, :models].sum(axis=2)
    if there.by_d_eta is not None and there.by_eta_eta is not None:
        border = _add_up(pairs, there.by_d_eta, models)
        matrix[:, :models, models] = matrix[:, models, :models] = border
        matrix[:, models, models] = there.by_eta_eta.sum(axis=1)
    return matrix


def pin_mean(matrix: Array, models: int) -> Array:
    """The same matrix, made invertible without a change to what it does to strengths whose mean is 0."""
    scale = matrix.diagonal(axis1=-2, axis2=-1)[..., :models].mean(axis=-1)
    matrix[..., :models, :models] += scale[..., None, None] / models
    return matrix


def _add_up(pairs: PairCounts, by_d: Array, models: int) -> Array:
    """Slopes by distance (B, P) as slopes by strength (B, M)."""
    import numpy as np

    batch = len(by_d)
    table = np.zeros((batch, models, models))
    table[:, pairs.left, pairs.right] = by_d
    return np.asarray(table.sum(axis=2) - table.sum(axis=1))


def _newton_step(pairs: PairCounts, there: Slopes, models: int) -> tuple[Array, Array | None]:
    import numpy as np

    gradient = _add_up(pairs, there.by_d, models)
    matrix = pin_mean(information(pairs, there, models), models)
    if there.by_eta is None:
        return solve_step(matrix, gradient), None
    gradient = np.concatenate([gradient, there.by_eta.sum(axis=1, keepdims=True)], axis=1)
    step = solve_step(matrix, gradient)
    return step[:, :models], step[:, models]
