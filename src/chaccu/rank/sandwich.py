"""Sandwich errors: a covariance of strengths that holds where the model of outcomes is wrong.

V = A⁻¹ B A⁻¹ with the information A and the sum B of squared scores (Huber 1967; White 1980); with questions, scores are added
up by question first (Liang and Zeger 1986, "Longitudinal data analysis using generalized linear models").

A battle's score is its slope by d, with the sign of the side, at the two models, and its slopes by what all battles share.
It ignores resamples and the scale of ratings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chaccu.rank.battles import LEFT_WINS, RIGHT_WINS, TIE
from chaccu.rank.cells import Cells
from chaccu.rank.outcome_model import OutcomeModel, slopes
from chaccu.rank.strengths import Strengths, information, pair_counts, pin_mean

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_BATCH_BYTES = 64 * 2**20


def sandwich_covariance(model: OutcomeModel, cells: Cells, point: Strengths) -> Array:
    """The covariance (M, M) of strengths, those with mean 0; by question where `cells` has them.

    `point` is a fit of one row. NaN for fewer than two battles or questions.
    """
    import numpy as np

    theta, eta = point.theta[0], point.eta
    models = len(theta)
    pairs = pair_counts(cells, cells.count[None, :].astype(np.float64))
    d = theta[pairs.left] - theta[pairs.right]
    there = slopes(model, pairs.won, pairs.lost, pairs.tied, d[None, :], eta)
    bread = pin_mean(information(pairs, there, models), models)[0]
    won, lost, tied = ((cells.outcome == outcome).astype(np.float64) for outcome in (LEFT_WINS, RIGHT_WINS, TIE))
    one = slopes(model, won, lost, tied, theta[cells.left] - theta[cells.right], eta)
    by_d = one.by_d
    shared = np.empty((len(by_d), 0)) if one.by_eta is None else one.by_eta[:, None]
    left, right = cells.left, cells.right
    if cells.cell is None or cells.repeats is None:
        # A cell stands for `count` equal battles, each with its own square.
        root = np.sqrt(cells.count)
        meat = sum_squared_scores(left, right, root * by_d, root[:, None] * shared, models)
    else:
        cell, repeats = cells.cell, cells.repeats
        meat = sum_squared_scores(
            left[cell], right[cell], repeats * by_d[cell], repeats[:, None] * shared[cell], models, cells.question
        )
    return join_sandwich(bread, meat, cells.independent)[:models, :models]


def join_sandwich(bread: Array, meat: Array, independent: int) -> Array:
    """A⁻¹ B A⁻¹ with the factor n / (n − 1) for n independent battles or questions; NaN for fewer than two."""
    import numpy as np

    factor = independent / (independent - 1) if independent > 1 else np.nan
    inverse = np.linalg.inv(bread)
    return np.asarray(factor * inverse @ meat @ inverse)


def sum_squared_scores(
    left: Array, right: Array, by_d: Array, shared: Array, models: int, question: Array | None = None
) -> Array:
    """The sum of each score times itself, (M + S, M + S), over N battles, or over the questions of each by their numbers (N,).

    `by_d` (N,) are slopes by the distance of `left` and `right`, `shared` (N, S) those by what all battles share.
    """
    import numpy as np

    if question is not None:
        return _sum_by_question(left, right, by_d, shared, models, question)
    meat = np.zeros((models + shared.shape[1],) * 2)
    square = by_d**2
    np.add.at(meat, (left, left), square)
    np.add.at(meat, (right, right), square)
    np.subtract.at(meat, (left, right), square)
    np.subtract.at(meat, (right, left), square)
    for k in range(shared.shape[1]):
        both = by_d * shared[:, k]
        border = np.bincount(left, both, models) - np.bincount(right, both, models)
        meat[:models, models + k] = meat[models + k, :models] = border
    meat[models:, models:] = shared.T @ shared
    return meat


def _sum_by_question(left: Array, right: Array, by_d: Array, shared: Array, models: int, question: Array) -> Array:
    import numpy as np

    order = np.argsort(question, kind="stable")
    numbers, size = question[order], models + shared.shape[1]
    questions, at_once = int(numbers[-1]) + 1, max(1, _BATCH_BYTES // (8 * size))
    meat = np.zeros((size, size))
    for first in range(0, questions, at_once):
        low, high = np.searchsorted(numbers, [first, first + at_once])
        rows, number = order[low:high], numbers[low:high] - first
        scores = np.zeros((min(at_once, questions - first), size))
        np.add.at(scores, (number, left[rows]), by_d[rows])
        np.subtract.at(scores, (number, right[rows]), by_d[rows])
        for k in range(shared.shape[1]):
            np.add.at(scores[:, models + k], number, shared[rows, k])
        meat += scores.T @ scores
    return meat
