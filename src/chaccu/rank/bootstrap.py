"""`resample_strengths`, `resample_with_style`: how strengths vary over resamples of battles, or of questions.

The non-parametric bootstrap (Efron 1979). A resample of battles is one multinomial draw; a resample of questions draws whole
questions, with all battles on them (cluster bootstrap; Davison and Hinkley 1997, section 3.8).

Invariant: what a resample misses, a cell of equal battles or a battle with its style, keeps `FLOOR` of a battle, so that the
resample's strengths stay finite. It ignores the scale of ratings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chaccu.rank.cells import Cells
from chaccu.rank.outcome_model import OutcomeModel
from chaccu.rank.strengths import Strengths, fit_strengths, pair_counts
from chaccu.rank.style_control import StyledBattles, StyledStrengths, refit_with_style

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FLOOR = 1e-3
_TOLERANCE = 1e-5
_BATCH_BYTES = 64 * 2**20


def resample_strengths(model: OutcomeModel, cells: Cells, point: Strengths, resamples: int, rng: np.random.Generator) -> Array:
    """Strengths (`resamples`, M) of as many resamples: of questions where `cells` has them, else of battles.

    The search begins at `point`, a fit of one row. Memory grows with a batch of some tens of MB, not with `resamples`.
    """
    import numpy as np

    theta = point.theta[0]
    eta = None if point.eta is None else float(point.eta[0])
    models = len(theta)
    batch = max(1, _BATCH_BYTES // (8 * (2 * models * models + 4 * len(cells.count))))
    found = np.empty((resamples, models))
    for first in range(0, resamples, batch):
        size = min(batch, resamples - first)
        counts = np.maximum(_draw_counts(cells, size, rng), FLOOR)
        fitted = fit_strengths(model, pair_counts(cells, counts), theta, eta, tolerance=_TOLERANCE)
        found[first : first + size] = fitted.theta
    return found


def resample_with_style(battles: StyledBattles, point: StyledStrengths, resamples: int, rng: np.random.Generator) -> Array:
    """Strengths and effects of style (`resamples`, M + K), of resamples of questions where there are some, else of battles.

    Each is a fit of all battles, from `point`: time grows with battles times `resamples`.
    """
    import numpy as np

    found = np.empty((resamples, len(point.theta) + len(point.beta)))
    for row in found:
        drawn = _draw(battles.independent, rng)
        weight = drawn if battles.question is None else drawn[battles.question]
        row[:] = refit_with_style(battles, point, np.maximum(weight, FLOOR))
    return found


def _draw_counts(cells: Cells, size: int, rng: np.random.Generator) -> Array:
    import numpy as np

    if cells.question is None or cells.cell is None or cells.repeats is None:
        total = int(cells.count.sum())
        return rng.multinomial(total, cells.count / total, size=size)
    counts = np.empty((size, len(cells.count)))
    for row in counts:
        drawn = _draw(cells.independent, rng)
        row[:] = np.bincount(cells.cell, weights=drawn[cells.question] * cells.repeats, minlength=len(row))
    return counts


def _draw(independent: int, rng: np.random.Generator) -> Array:
    """How often each of so many is drawn, with replacement, in as many draws."""
    import numpy as np

    return np.bincount(rng.integers(0, independent, independent), minlength=independent)
