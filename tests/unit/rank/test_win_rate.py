from __future__ import annotations

import gzip
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chaccu.errors import DataError
from chaccu.rank import measure_win_rate, preference_from_logprobs, share_of_preference

ALPACA = Path(__file__).parents[4] / "shared" / "data" / "alpaca_eval"


def read_annotations(name: str) -> list[dict[str, Any]]:
    if not ALPACA.is_dir():
        pytest.skip(f"the annotations are not there: {ALPACA}")
    with gzip.open(ALPACA / name, "rt") as lines:
        return [json.loads(line) for line in lines]


def known_figures() -> list[dict[str, Any]]:
    if not ALPACA.is_dir():
        return []
    expected = json.loads((ALPACA / "expected.json").read_text())
    return [figures for version in ("ae1", "ae2") for figures in expected[version].values()]


@pytest.mark.parametrize("known", known_figures(), ids=lambda known: known["file"])
def test_published_annotations_give_the_published_figures(known: dict[str, Any]) -> None:
    found = measure_win_rate([share_of_preference(row["preference"]) for row in read_annotations(known["file"])])
    assert (found.counted, found.dropped) == (known["n_total"], known["dropped"])
    assert (found.wins, found.losses, found.draws) == (known["n_wins"], known["n_wins_base"], known["n_draws"])
    assert found.standard_error is not None
    for value, name in (
        (found.win_rate, "win_rate"),
        (found.standard_error, "standard_error"),
        (found.discrete_win_rate, "discrete_win_rate"),
    ):
        assert 100 * value == pytest.approx(known["published"][name], abs=1e-4)
    assert found.low < found.win_rate < found.high


def test_preferences_are_the_judges_own_probabilities() -> None:
    known = [one["preference_from_logprobs"] for one in known_figures() if "preference_from_logprobs" in one]
    direct = swapped = neither = 0
    for row in read_annotations("ae2_vicuna-7b.jsonl.gz"):
        if "top_logprobs" not in row:
            continue
        share = preference_from_logprobs(row["top_logprobs"], "m", "M")
        if share is None:
            neither += 1
        elif share == pytest.approx(row["preference"] - 1, abs=1e-6):
            direct += 1
        elif 1 - share == pytest.approx(row["preference"] - 1, abs=1e-6):
            swapped += 1
    assert [{"rows": 803, "equal_direct": direct, "equal_swapped": swapped, "neither": neither}] == known


def test_a_token_that_is_not_listed_has_no_probability() -> None:
    assert preference_from_logprobs({"m": -0.1, "The": -3.0}, "m", "M") == 1
    assert preference_from_logprobs({"M": -0.1}, "m", "M") == 0
    assert preference_from_logprobs({"The": -0.1}, "m", "M") is None
    assert preference_from_logprobs({"m": -2000.0, "M": 0.0}, "m", "M") == 0
    assert preference_from_logprobs({"m": math.log(0.3), "M": math.log(0.1)}, "m", "M") == pytest.approx(0.75)


def test_missing_verdicts_are_counted_apart() -> None:
    found = measure_win_rate([1, None, 0.5, 0, None, 1])
    assert (found.counted, found.dropped, found.wins, found.losses, found.draws) == (4, 2, 2, 1, 1)
    assert found.win_rate == 0.625
    assert found.standard_error == pytest.approx(statistics.stdev([1, 0.5, 0, 1]) / 2)


def test_ten_wins_of_ten_are_not_certain() -> None:
    found = measure_win_rate([1.0] * 10)
    # Wilson's interval for ten of ten.
    assert (found.win_rate, found.high) == (1, 1)
    assert found.low == pytest.approx(0.72247, abs=1e-4)
    mixed = measure_win_rate([1.0] * 30 + [0.0] * 70)
    assert (mixed.low, mixed.high) == (pytest.approx(0.2189, abs=1e-3), pytest.approx(0.3958, abs=1e-3))
    assert measure_win_rate([1.0]).standard_error is None


def test_clusters_that_repeat_themselves_count_once() -> None:
    shares = [1.0, 0.0, 1.0, 1.0, 0.5, 0.0]
    once, twice = measure_win_rate(shares), measure_win_rate(shares * 2, clusters=list(range(6)) * 2)
    assert twice.standard_error == pytest.approx(once.standard_error)
    assert (twice.low, twice.high) == (pytest.approx(once.low), pytest.approx(once.high))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = plain = 0
    for _ in range(400):
        rates = rng.beta(3, 2, size=60)
        shares = rng.binomial(1, np.repeat(rates, 4)).astype(float).tolist()
        clustered = measure_win_rate(shares, clusters=np.repeat(np.arange(60), 4).tolist())
        held += clustered.low <= 0.6 <= clustered.high
        naive = measure_win_rate(shares)
        plain += naive.low <= 0.6 <= naive.high
    assert 0.92 <= held / 400 <= 0.98
    assert plain < held


@pytest.mark.parametrize(
    ("shares", "clusters", "says"),
    [
        ([], None, "of 0 comparisons none"),
        ([None, None], None, "of 2 comparisons none"),
        ([0.2, 1.5], None, "a share of 1.5"),
        ([0.2, 1.0], ["a"], "2 shares have 1 clusters"),
    ],
)
def test_what_cannot_be_counted_is_refused(shares: list[float | None], clusters: list[str] | None, says: str) -> None:
    with pytest.raises(DataError, match=says):
        measure_win_rate(shares, clusters=clusters)


def test_preferences_are_read_as_alpaca_eval_writes_them() -> None:
    assert [share_of_preference(value) for value in (1, 2, 0, 1.5, 1.25, None, math.nan)] == [0, 1, 0.5, 0.5, 0.25, None, None]
    with pytest.raises(DataError, match="3 is no preference"):
        share_of_preference(3)
