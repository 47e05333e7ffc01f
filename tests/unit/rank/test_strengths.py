from __future__ import annotations

import math
from typing import Any

import evalica
import numpy as np
import pytest
from scipy.optimize import minimize

from chaccu.errors import DataError
from chaccu.rank import parse_battles
from chaccu.rank.cells import count_cells
from chaccu.rank.outcome_model import OutcomeModel, first_eta, slopes
from chaccu.rank.sandwich import sandwich_covariance
from chaccu.rank.strengths import fit_strengths, pair_counts

Array = np.ndarray[Any, Any]


def draw_rows(seed: int, battles: int, models: int = 6) -> list[tuple[str, str, str]]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1, models)
    rows = []
    for _ in range(battles):
        a, b = rng.choice(models, 2, replace=False)
        won = rng.random() < 1 / (1 + math.exp(truth[b] - truth[a]))
        rows.append((f"m{a}", f"m{b}", "tie" if rng.random() < 0.25 else "model_a" if won else "model_b"))
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_those_of_evalica(seed: int) -> None:
    battles = parse_battles(draw_rows(seed, 400))
    cells = count_cells(battles)
    found = fit_strengths("half", pair_counts(cells, cells.count[None, :].astype(float)), np.zeros(6), None, tolerance=1e-11)
    winners = [(evalica.Winner.X, evalica.Winner.Draw, evalica.Winner.Y)[one] for one in battles.outcome.tolist()]
    known = evalica.bradley_terry(battles.left, battles.right, winners, tolerance=1e-13, limit=100_000).scores
    log = np.log(known.reindex(range(6)).to_numpy())
    assert found.theta[0] == pytest.approx(log - log.mean(), abs=1e-6)


def log_likelihood(model: OutcomeModel, won: Array, lost: Array, tied: Array, d: Array, eta: float) -> float:
    """As the papers write the probabilities."""
    one, other = np.exp(d / 2), np.exp(-d / 2)
    if model == "half":
        win, loss = one / (one + other), other / (one + other)
        tie = np.sqrt(win * loss)
    elif model == "davidson":
        total = one + other + math.exp(eta)
        win, loss, tie = one / total, other / total, math.exp(eta) / total
    else:
        threshold = math.exp(eta)
        win, loss = one / (one + threshold * other), other / (other + threshold * one)
        tie = 1 - win - loss
    return float((won * np.log(win) + lost * np.log(loss) + tied * np.log(tie)).sum())


@pytest.mark.parametrize("model", ["davidson", "rao_kupper"])
def test_tie_models_reach_the_maximum_of_their_likelihood(model: OutcomeModel) -> None:
    cells = count_cells(parse_battles(draw_rows(7, 500)))
    pairs = pair_counts(cells, cells.count[None, :].astype(float))
    eta = first_eta(model, float(pairs.tied.sum()), float(cells.count.sum()))
    found = fit_strengths(model, pairs, np.zeros(6), eta, tolerance=1e-11)
    assert found.eta is not None

    def loss(point: Array) -> float:
        d = point[pairs.left] - point[pairs.right]
        return -log_likelihood(model, pairs.won[0], pairs.lost[0], pairs.tied[0], d, point[-1])

    known = minimize(loss, np.array([0.0] * 6 + [0.3]), method="BFGS", options={"gtol": 1e-7}).x
    assert found.theta[0] == pytest.approx(known[:6] - known[:6].mean(), abs=1e-4)
    assert found.eta[0] == pytest.approx(known[6], abs=1e-4)


@pytest.mark.parametrize("model", ["half", "davidson", "rao_kupper"])
def test_second_slopes_are_the_slopes_of_the_first(model: OutcomeModel) -> None:
    rng = np.random.default_rng(3)
    won, lost, tied = (rng.integers(0, 9, 20).astype(float) for _ in range(3))
    d, eta, step = rng.normal(0, 2, 20), np.full(20, 0.4), 1e-6

    def at(d: Array, eta: Array) -> Any:
        return slopes(model, won, lost, tied, d, eta)

    there = at(d, eta)
    assert -(at(d + step, eta).by_d - at(d - step, eta).by_d) / (2 * step) == pytest.approx(there.by_dd, abs=1e-5)
    if model != "half":
        assert -(at(d, eta + step).by_d - at(d, eta - step).by_d) / (2 * step) == pytest.approx(there.by_d_eta, abs=1e-5)
        by_eta = -(at(d, eta + step).by_eta - at(d, eta - step).by_eta) / (2 * step)
        assert by_eta == pytest.approx(there.by_eta_eta, abs=1e-4)


@pytest.mark.parametrize("model", ["half", "davidson", "rao_kupper"])
def test_fits_side_by_side_are_the_fits_one_by_one_even_of_almost_nothing(model: OutcomeModel) -> None:
    cells = count_cells(parse_battles(draw_rows(1, 60)))
    rng = np.random.default_rng(0)
    counts = np.maximum(rng.multinomial(60, cells.count / 60, size=40), 1e-3)
    counts[0] = 1e-3
    counts[1, 0] = 1e6
    eta = first_eta(model, 15, 60)
    together = fit_strengths(model, pair_counts(cells, counts), np.zeros(6), eta, tolerance=1e-6)
    assert np.isfinite(together.theta).all()
    for row in (0, 1, 17):
        alone = fit_strengths(model, pair_counts(cells, counts[row : row + 1]), np.zeros(6), eta, tolerance=1e-6)
        assert together.theta[row] == pytest.approx(alone.theta[0], abs=1e-4)


def test_a_likelihood_without_a_maximum_is_said_to_have_none() -> None:
    cells = count_cells(parse_battles([("a", "b", "model_a")]))
    with pytest.raises(DataError, match=r"no finite value|did not settle"):
        fit_strengths("half", pair_counts(cells, np.ones((1, 1))), np.zeros(2), None, tolerance=1e-30)


def test_a_model_of_ties_begins_where_equal_models_tie_as_often() -> None:
    davidson, rao_kupper = first_eta("davidson", 1, 4), first_eta("rao_kupper", 1, 4)
    assert davidson is not None
    assert rao_kupper is not None
    assert math.exp(davidson) / (2 + math.exp(davidson)) == pytest.approx(0.25)
    assert 1 - 2 / (1 + math.exp(rao_kupper)) == pytest.approx(0.25)
    assert [first_eta("half", 1, 4), first_eta("davidson", 0, 4), first_eta("davidson", 4, 4)] == [None, None, None]


@pytest.mark.parametrize("by_question", [False, True])
@pytest.mark.parametrize("model", ["half", "davidson", "rao_kupper"])
def test_errors_are_those_of_numerical_slopes_of_the_likelihood(model: OutcomeModel, by_question: bool) -> None:
    rows = [(*row, f"q{number % 29}") for number, row in enumerate(draw_rows(5, 200, models=4))]
    battles = parse_battles(rows if by_question else [row[:3] for row in rows])
    cells = count_cells(battles)
    pairs = pair_counts(cells, cells.count[None, :].astype(float))
    eta = first_eta(model, float(pairs.tied.sum()), 200)
    point = fit_strengths(model, pairs, np.zeros(4), eta, tolerance=1e-11)
    found = sandwich_covariance(model, cells, point)
    won, tied, lost = ((battles.outcome == outcome).astype(float) for outcome in range(3))

    def loss(at: Array, chosen: Any = slice(None)) -> float:
        # The last model's strength is minus that of the others, so that their mean is 0 and nothing is singular.
        theta = np.append(at[:3], -at[:3].sum())
        d = theta[battles.left] - theta[battles.right]
        return log_likelihood(model, won[chosen], lost[chosen], tied[chosen], d[chosen], at[-1])

    free = np.append(point.theta[0][:3], [] if point.eta is None else point.eta)
    step = 1e-4 * np.eye(len(free))
    groups = [np.flatnonzero(battles.question == number) for number in range(29)] if by_question else np.arange(200)[:, None]
    scores = np.array([[(loss(free + h, group) - loss(free - h, group)) / 2e-4 for h in step] for group in groups])
    information = [
        [(loss(free + g + h) - loss(free + g - h) - loss(free - g + h) + loss(free - g - h)) for h in step] for g in step
    ]
    inverse = np.linalg.inv(-np.array(information) / 4e-8)
    known = inverse @ (scores.T @ scores) @ inverse * len(groups) / (len(groups) - 1)
    assert found[:3, :3] == pytest.approx(known[:3, :3], rel=1e-3, abs=1e-5)
    assert found.sum(axis=0) == pytest.approx(np.zeros(4), abs=1e-12)
