from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaccu.errors import UsageError
from chaccu.rank import Ranking, Rating, find_components, find_tiers, parse_battles, rank_battles, read_battles
from chaccu.rank.ranking import Intervals

ARENA = Path(__file__).parents[4] / "shared" / "data" / "arena"


def rows_of(ranking: Ranking) -> dict[str, Rating]:
    return {row.model: row for row in ranking.ratings}


@pytest.fixture(scope="module")
def crowd() -> tuple[Ranking, dict[str, dict[str, float]]]:
    if not ARENA.is_dir():
        pytest.skip(f"the crowd votes are not there: {ARENA}")
    expected = json.loads((ARENA / "expected.json").read_text())["ratings"]
    return rank_battles(read_battles(ARENA / "llmfao_dev.csv"), bootstraps=0), expected


def test_crowd_votes_give_the_known_ratings(crowd: tuple[Ranking, dict[str, dict[str, float]]]) -> None:
    ranking, expected = crowd
    assert (ranking.battles, len(ranking.ratings), len(ranking.components)) == (2826, 59, 1)
    for row in ranking.ratings:
        known = expected[row.model]
        assert row.rating == pytest.approx(known["bt"], abs=1e-3)
        assert row.elo == pytest.approx(known["elo_k4_file_order"], abs=1e-4)
        assert row.battles == known["votes"]
        assert row.wins + row.losses + row.ties == row.battles
    assert [row.model for row in ranking.ratings] == list(expected)


@pytest.mark.parametrize(
    ("column", "known_as", "intervals"),
    [
        (None, "ci95_vote_bootstrap", "bootstrap"),
        ("id", "ci95_comparison_bootstrap", "bootstrap"),
        (None, "ci95_vote_bootstrap", "sandwich"),
        ("id", "ci95_comparison_bootstrap", "sandwich"),
    ],
)
def test_crowd_votes_give_intervals_like_the_known_ones(column: str | None, known_as: str, intervals: Intervals) -> None:
    if not ARENA.is_dir():
        pytest.skip(f"the crowd votes are not there: {ARENA}")
    expected = json.loads((ARENA / "expected.json").read_text())
    battles = read_battles(ARENA / "llmfao_dev.csv", question_column=column)
    ranking = rank_battles(battles, intervals=intervals)
    off = []
    for row in ranking.ratings:
        assert row.low is not None
        assert row.high is not None
        assert row.rating is not None
        assert row.low < row.rating < row.high
        low, high = expected["ratings"][row.model][known_as]
        off += [abs(row.low - low), abs(row.high - high)]
    # Both sides are resamples, with a spread of some points of their own at each end; the sandwich's are symmetric too.
    assert sum(off) / len(off) < (6 if intervals == "bootstrap" else 10)
    assert max(off) < (30 if intervals == "bootstrap" else 60)
    if column and intervals == "bootstrap":
        assert ranking.questions == 672
        assert ranking.separability == pytest.approx(expected["separability_comparison_bootstrap"], abs=0.02)


def test_two_models_have_the_closed_form_distance() -> None:
    ranking = rank_battles(parse_battles([("a", "b", "model_a")] * 3 + [("b", "a", "model_a")]), bootstraps=50)
    a, b = rows_of(ranking)["a"], rows_of(ranking)["b"]
    assert a.rating is not None
    assert b.rating is not None
    assert a.rating - b.rating == pytest.approx(400 * math.log10(3), abs=1e-6)
    assert a.rating + b.rating == pytest.approx(2000)
    assert (a.wins, a.losses, b.wins, b.losses) == (3, 1, 1, 3)


def test_a_tie_is_half_a_win_for_each() -> None:
    ties = rank_battles(parse_battles([("a", "b", "tie")] * 2 + [("a", "b", "model_a")]), bootstraps=0)
    halves = rank_battles(parse_battles([("a", "b", "model_a")] * 2 + [("a", "b", "model_b")]), bootstraps=0)
    assert rows_of(ties)["a"].rating == pytest.approx(rows_of(halves)["a"].rating)
    assert (rows_of(ties)["a"].ties, ties.ties) == (2, 2)
    assert (rows_of(ties)["a"].low, rows_of(ties)["a"].high) == (None, None)


def test_models_that_never_met_are_not_ranked_together() -> None:
    ranking = rank_battles(parse_battles([("a", "b", "tie"), ("c", "d", "tie"), ("d", "e", "tie")]), bootstraps=10)
    assert ranking.components == [["c", "d", "e"], ["a", "b"]]
    assert {row.model: row.component for row in ranking.ratings} == {"c": 1, "d": 1, "e": 1, "a": 2, "b": 2}
    assert all(row.rating == pytest.approx(1000) for row in ranking.ratings)


def test_a_model_that_won_every_battle_has_no_finite_rating() -> None:
    battles = [("top", "a", "model_a"), ("b", "top", "model_b"), ("a", "b", "tie"), ("b", "low", "model_a")]
    ranking = rank_battles(parse_battles(battles), bootstraps=10)
    assert [(row.model, row.tier, row.rating is None) for row in ranking.ratings] == [
        ("top", 1, True),
        ("a", 2, False),
        ("b", 2, False),
        ("low", 3, True),
    ]
    assert len(ranking.components) == 1


def test_equal_seeds_give_equal_intervals() -> None:
    battles = parse_battles([("a", "b", "model_a")] * 20 + [("a", "b", "model_b")] * 15 + [("b", "c", "tie")] * 9)
    assert rank_battles(battles, bootstraps=50, seed=3) == rank_battles(battles, bootstraps=50, seed=3)
    assert rank_battles(battles, bootstraps=50, seed=3) != rank_battles(battles, bootstraps=50, seed=4)


_battle = st.tuples(st.integers(0, 7), st.integers(0, 7), st.sampled_from(["model_a", "model_b", "tie"])).filter(
    lambda battle: battle[0] != battle[1]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_battle, min_size=1, max_size=40))
def test_whatever_the_battles_counts_reconcile_and_ratings_are_finite(rows: list[tuple[int, int, str]]) -> None:
    ranking = rank_battles(parse_battles([(f"m{a}", f"m{b}", winner) for a, b, winner in rows]), bootstraps=5)
    assert sum(row.battles for row in ranking.ratings) == 2 * len(rows)
    assert sum(row.wins for row in ranking.ratings) == sum(row.losses for row in ranking.ratings) == len(rows) - ranking.ties
    assert sorted(row.model for row in ranking.ratings) == sorted(model for part in ranking.components for model in part)
    for row in ranking.ratings:
        for value in (row.rating, row.low, row.high, row.elo):
            assert value is None or math.isfinite(value)


def test_tiers_are_in_order_and_components_apart() -> None:
    assert find_components([0, 1, 2, 3, 4], [(0, 1), (3, 4), (2, 3)]) == [[2, 3, 4], [0, 1]]
    assert find_tiers([0, 1, 2, 3], [(3, 2), (2, 3), (2, 0), (0, 1), (1, 0)]) == [[2, 3], [0, 1]]
    long_chain = [(i, i + 1) for i in range(5000)]
    assert len(find_tiers(range(5001), long_chain)) == 5001


def test_dropped_ties_are_counted_and_rate_nobody() -> None:
    rows = [("a", "b", "model_a")] * 3 + [("a", "b", "model_b")] + [("a", "b", "tie")] * 9 + [("b", "c", "tie")]
    ranking = rank_battles(parse_battles(rows), ties="drop", bootstraps=20)
    a, b, c = (rows_of(ranking)[name] for name in "abc")
    assert a.rating is not None
    assert b.rating is not None
    assert a.rating - b.rating == pytest.approx(400 * math.log10(3))
    assert (a.ties, ranking.ties, ranking.battles) == (9, 10, 14)
    assert (c.rating, c.ties, c.elo) == (None, 1, 1000)
    on_questions = [(*row, "q" if row[2] == "tie" else str(number)) for number, row in enumerate(rows)]
    assert rank_battles(parse_battles(on_questions), ties="drop", bootstraps=20).questions == 4
    assert ranking.components == [["a", "b"], ["c"]]


def test_questions_that_repeat_themselves_widen_intervals() -> None:
    votes = [("model_a", 0), ("model_a", 1), ("model_b", 2), ("model_a", 3), ("model_b", 4), ("model_a", 5)] * 4
    rows = [("a", "b", winner, f"q{question}-{turn // 6}") for turn, (winner, question) in enumerate(votes)]
    widths = []
    for intervals in ("bootstrap", "sandwich"):
        for by_question in (True, False):
            ranking = rank_battles(parse_battles(rows * 4), intervals=intervals, by_question=by_question)
            row = rows_of(ranking)["a"]
            assert row.low is not None
            assert row.high is not None
            widths.append(row.high - row.low)
            assert ranking.questions == (24 if by_question else None)
    # Each question's four equal votes are worth one: intervals are twice as wide.
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15)
    assert widths[2] / widths[3] == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize("intervals", ["bootstrap", "sandwich"])
@pytest.mark.parametrize(
    "rows",
    [
        [("a", "b", "model_a", "1")] * 2 + [("a", "b", "model_b", "1")],
        [("a", "b", "tie")],
        [("a", "b", "tie"), ("b", "a", "tie")],
        [("a", "b", winner, f"q{question}") for question in range(30) for winner in ("model_a", "model_b")],
    ],
    ids=["one question", "one battle", "ties", "flips"],
)
def test_battles_without_a_spread_tell_no_error(rows: list[tuple[str, str, str]], intervals: Intervals) -> None:
    ranking = rank_battles(parse_battles(rows), intervals=intervals, with_pairs=True)
    row = rows_of(ranking)["a"]
    assert row.rating is not None
    assert (row.low, row.high, row.standard_error, row.best_rank, row.worst_rank) == (None, None, None, None, None)
    assert (ranking.separability, ranking.distinct) == (None, None)
    assert [(pair.low, pair.high, pair.p_value) for pair in ranking.pairs] == [(None, None, None)]


def test_without_resamples_there_are_no_intervals_and_pairs_are_tested_by_their_errors() -> None:
    battles = parse_battles([("a", "b", "model_a")] * 8 + [("a", "b", "model_b")] * 4)
    ranking = rank_battles(battles, bootstraps=0, with_pairs=True)
    a = rows_of(ranking)["a"]
    assert (a.low, a.high, a.best_rank, ranking.separability) == (None, None, None, None)
    assert a.standard_error is not None
    # Half the distance ln 2, whose variance is 1 / (12 · 2/3 · 1/3), with the factor 12 / 11.
    assert a.standard_error == pytest.approx(400 / math.log(10) / 2 * math.sqrt(12 / 11 / (12 * 2 / 9)))
    (pair,) = ranking.pairs
    z = 400 * math.log10(2) / (2 * a.standard_error)
    assert pair.p_value == pytest.approx(math.erfc(z / math.sqrt(2)))
    assert rank_battles(battles, intervals="sandwich").bootstraps == 0


@pytest.mark.parametrize("intervals", ["bootstrap", "sandwich"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(intervals: Intervals) -> None:
    rng = np.random.default_rng(5)
    truth = np.array([0.7, 0.2, 0.0, -0.3, -0.6])
    points = 1000 + 400 / math.log(10) * (truth - truth.mean())
    names = list("abcde")
    held = 0
    for trial in range(60):
        rows = []
        for question in range(80):
            # What a question is about favours some models: its battles are not independent.
            lean = truth + rng.normal(0, 0.8, 5)
            for _ in range(5):
                a, b = rng.choice(5, 2, replace=False)
                won = rng.random() < 1 / (1 + math.exp(lean[b] - lean[a]))
                rows.append((names[a], names[b], "model_a" if won else "model_b", str(question)))
        ranking = rows_of(rank_battles(parse_battles(rows), bootstraps=200, seed=trial, intervals=intervals))
        for name, point in zip(names, points, strict=True):
            row = ranking[name]
            # The leaning shrinks log-odds a little, which is no fault of the interval.
            shrunk = 1000 + (point - 1000) * 0.9
            held += row.low is not None and row.high is not None and row.low <= shrunk <= row.high
    assert 0.91 <= held / 300 <= 0.985


def test_pairs_are_tested_and_what_they_have_in_common_is_gone() -> None:
    rows = [("a", "b", "model_a")] * 58 + [("a", "b", "model_b")] * 42
    rows += [(x, "c", winner) for x in "ab" for winner in ["model_a"] * 9 + ["model_b"]]
    for intervals in ("bootstrap", "sandwich"):
        ranking = rank_battles(parse_battles(rows), intervals=intervals, with_pairs=True)
        ab = next(pair for pair in ranking.pairs if (pair.model_a, pair.model_b) == ("a", "b"))
        assert len(ranking.pairs) == 3
        assert ab.low is not None
        assert ab.high is not None
        assert ab.low < ab.difference < ab.high
        assert ab.p_value is not None
        assert 0.01 < ab.p_value < 0.2
        assert ranking.distinct == pytest.approx(2 / 3)
        assert {(row.best_rank, row.worst_rank) for row in ranking.ratings} == {(1, 2), (3, 3)}
        assert ranking.separability == pytest.approx(2 / 3)


def test_style_has_no_model_of_ties() -> None:
    battles = msgspec.structs.replace(parse_battles([("a", "b", "tie")]), style=np.zeros((1, 1)), styles=("length",))
    with pytest.raises(UsageError, match="have no model 'davidson'"):
        rank_battles(battles, ties="davidson")
