from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaccu.errors import DataError, StorageError
from chaccu.rank import Ranking, Rating, find_components, find_tiers, parse_battles, rank_battles, read_battles

ARENA = Path(__file__).parents[4] / "shared" / "data" / "arena"


def rows_of(ranking: Ranking) -> dict[str, Rating]:
    return {row.model: row for row in ranking.ratings}


@pytest.fixture(scope="module")
def crowd() -> tuple[Ranking, dict[str, dict[str, float]]]:
    if not ARENA.is_dir():
        pytest.skip(f"the crowd votes are not there: {ARENA}")
    expected = json.loads((ARENA / "expected.json").read_text())["ratings"]
    return rank_battles(read_battles(ARENA / "llmfao_dev.csv"), bootstraps=400), expected


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


def test_crowd_votes_give_intervals_like_the_known_ones(crowd: tuple[Ranking, dict[str, dict[str, float]]]) -> None:
    ranking, expected = crowd
    off = []
    for row in ranking.ratings:
        assert row.low is not None
        assert row.high is not None
        assert row.rating is not None
        assert row.low < row.rating < row.high
        low, high = expected[row.model]["ci95_vote_bootstrap"]  # type: ignore[misc]
        off += [abs(row.low - low), abs(row.high - high)]
    # Both sides are resamples, with a spread of some points of their own at each end.
    assert sum(off) / len(off) < 8
    assert max(off) < 40


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("b.csv", "winner,model_b,extra,model_a\nmodel_a,y,1,x\ntie,z,2,y\n"),
        ("b.csv", "left,right,winner\nx,y,left\ny,z,tie (bothbad)\n"),
        (
            "b.jsonl",
            '{"model_a": "x", "model_b": "y", "winner": "model_a"}\n{"model_a": "y", "model_b": "z", "winner": "tie"}\n',
        ),
    ],
)
def test_files_of_all_shapes_hold_the_same_battles(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    battles = read_battles(tmp_path / name)
    assert (battles.models, battles.left.tolist(), battles.right.tolist(), battles.outcome.tolist()) == (
        ["x", "y", "z"],
        [0, 1],
        [1, 2],
        [0, 1],
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has the columns"),
        ("a,b\n1,2\n", "has the columns a, b"),
        ("model_a,model_b,winner\n", "holds no battle"),
        ("model_a,model_b,winner\nx,y,tie\nx,y,both\n", "battle 2 of .* has the winner 'both'"),
        ("model_a,model_b,winner\nx,x,tie\n", "sets x against itself"),
        ("model_a,model_b,winner\nx,,tie\n", "names no model"),
    ],
)
def test_wrong_files_are_refused_with_the_row(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        read_battles(tmp_path / "b.csv")


def test_broken_json_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"model_a": "x", "model_b"')
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_battles(tmp_path / "b.jsonl")
    with pytest.raises(StorageError, match="there is no file"):
        read_battles(tmp_path / "none.csv")
