from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chaccu.errors import DataError
from chaccu.rank import control_length, measure_win_rate, share_of_preference

ALPACA = Path(__file__).parents[4] / "shared" / "data" / "alpaca_eval"


def known_figures() -> list[dict[str, Any]]:
    if not ALPACA.is_dir():
        pytest.skip(f"the annotations are not there: {ALPACA}")
    expected = json.loads((ALPACA / "expected.json").read_text())
    return [figures for version in ("ae1", "ae2") for figures in expected[version].values()]


def test_published_annotations_give_nearly_the_published_rates() -> None:
    difficulty = {}
    for known in known_figures():
        difficulty = json.loads((ALPACA / "instruction_difficulty_estimate.json").read_text())
        with gzip.open(ALPACA / known["file"], "rt") as lines:
            rows = [json.loads(line) for line in lines]
        shares = [share_of_preference(row["preference"]) for row in rows]
        lengths, others = [row["len_2"] for row in rows], [row["len_1"] for row in rows]
        found = control_length(shares, lengths, others, [difficulty[row["item"]] for row in rows])
        assert 100 * found.win_rate == pytest.approx(known["published"]["length_controlled_winrate"], abs=1.0)
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.win_rate < found.high
        assert (found.counted, found.dropped) == (805, 0)
        own = known.get("lc_own_estimate")
        if own:
            plain = control_length(shares, lengths, others, [difficulty[row["item"]] for row in rows], ridge=0)
            length, level, model = own["coef_len_diff_intercept"]
            assert (plain.model, plain.difficulty) == (pytest.approx(model, abs=0.05), pytest.approx(level, abs=0.05))
            assert plain.length == pytest.approx(length, abs=0.05)
    assert difficulty


def simulate(rng: np.random.Generator, model: float, length: float, count: int = 600) -> tuple[list[float], Any, Any]:
    own, other = rng.normal(1200, 300, count), rng.normal(900, 300, count)
    gap = other - own
    odds = model + length * np.tanh(gap / gap.std(ddof=1))
    return rng.binomial(1, 1 / (1 + np.exp(-odds))).astype(float).tolist(), own, other


def test_a_model_that_only_writes_more_comes_down_to_a_half() -> None:
    shares, own, other = simulate(np.random.default_rng(0), 0.0, -1.5, 4000)
    assert measure_win_rate(shares).win_rate > 0.62
    found = control_length(shares, own, other)
    assert found.win_rate == pytest.approx(0.5, abs=0.04)
    assert found.length == pytest.approx(-1.5, abs=0.2)
    assert found.difficulty is None


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    truth = 1 / (1 + np.exp(-0.4))
    held = 0
    for _ in range(300):
        found = control_length(*simulate(rng, 0.4, -1.0))
        held += found.low is not None and found.high is not None and found.low <= truth <= found.high
    assert 0.92 <= held / 300 <= 0.98


def test_shares_of_one_question_that_repeat_themselves_count_once() -> None:
    shares, own, other = simulate(np.random.default_rng(3), 0.3, -1.0, 200)
    once = control_length(shares, own, other, ridge=0)
    twice = control_length(shares * 2, [*own] * 2, [*other] * 2, clusters=list(range(200)) * 2, ridge=0)
    single = control_length(shares * 2, [*own] * 2, [*other] * 2, ridge=0)
    assert once.standard_error is not None
    assert single.standard_error is not None
    # The standard deviation of the length differences is of twice as many rows, so that figures differ by a trifle.
    assert twice.standard_error == pytest.approx(once.standard_error, rel=0.01)
    assert (twice.low, twice.high) == (pytest.approx(once.low, abs=2e-3), pytest.approx(once.high, abs=2e-3))
    assert single.standard_error == pytest.approx(once.standard_error / 2**0.5, rel=0.01)


def test_one_question_alone_tells_no_error() -> None:
    found = control_length([1.0, 0.0, 0.0, None], [1, 2, 3, 4], [4, 3, 2, 1], clusters=["q", "q", "q", "p"])
    assert (found.counted, found.standard_error, found.low, found.high) == (3, None, None, None)
    assert 0 < found.win_rate < 1


def test_twenty_wins_of_twenty_are_not_certain() -> None:
    wilson = measure_win_rate([1.0] * 20)
    for lengths in ([5] * 20, list(range(20))):
        found = control_length([1.0] * 20, lengths, [5] * 20)
        assert found.low is not None
        assert wilson.low - 0.15 < found.low < wilson.low + 0.02
    # Whoever writes more wins: nothing is left to tell how good the answers are.
    longer = control_length([1.0, 0.0] * 20, [2, 1] * 20, [1, 2] * 20)
    assert longer.low is not None
    assert longer.high is not None
    assert longer.win_rate == pytest.approx(0.5)
    assert longer.high - longer.low > 0.4


def test_rates_stay_finite_where_one_side_won_everything_and_lengths_are_equal() -> None:
    found = control_length([1.0] * 20 + [None], [5] * 21, [5] * 21)
    assert (found.counted, found.dropped) == (20, 1)
    assert 0.9 < found.win_rate < 1
    assert found.length == 0


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (([1.0, 0.0], [1, 2], [1]), "differ in length: 2, 2, 1"),
        (([None], [1], [1]), "of 1 comparisons none"),
        (([2.0], [1], [1]), "a share of 2 is outside"),
        (([1.0], [float("nan")], [1]), "no finite number"),
        (([1.0], [1], [1], [float("inf")]), "no finite number"),
    ],
)
def test_what_cannot_be_fitted_is_refused(columns: tuple[Any, ...], says: str) -> None:
    with pytest.raises(DataError, match=says):
        control_length(*columns)
