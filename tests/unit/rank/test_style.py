from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest

from chaccu.errors import DataError
from chaccu.rank import battles_of_frames, rank_battles, read_battles
from chaccu.rank.leaderboard import describe
from chaccu.rank.style import count_style
from chaccu.rank.style_control import fit_with_style, refit_with_style, take_styles


def test_styles_are_counted_outside_of_code() -> None:
    assert count_style(["`````md\r\n# no\r\n`````\r\n- yes\r\n", "```x``` is **bold**\n# Yes\n"])[:, 1:].tolist() == [
        [0, 1, 0],
        [1, 0, 1],
    ]
    prose = "# One\n\n## Two\n#no header\n- a\n  * b\n1. c\n2) d\n**bold** and __bold__, not ** this **\n"
    text = prose + "```sh\n# no\n- no\n```\n+ e\n"
    assert count_style([text, "", "```\n- never closed\n# no"]).tolist() == [
        [len(text), 2, 5, 2],
        [0, 0, 0, 0],
        [len("```\n- never closed\n# no"), 0, 0, 0],
    ]


def make_rows(seed: int, battles: int, effect: float) -> list[dict[str, Any]]:
    """The better model writes as well as the worse one, only shorter; whoever writes more wins more."""
    rng = np.random.default_rng(seed)
    strength, usual = {"short": 0.5, "long": 0.0, "mid": 0.2}, {"short": 400, "long": 1600, "mid": 800}
    rows = []
    for question in range(battles):
        a, b = rng.choice(list(strength), 2, replace=False).tolist()
        length = [int(usual[name] * math.exp(rng.normal(0, 0.4))) for name in (a, b)]
        share = (length[0] - length[1]) / sum(length)
        won = rng.random() < 1 / (1 + math.exp(strength[b] - strength[a] - effect * share))
        winner = "model_a" if won else "model_b"
        rows.append(
            {
                "model_a": a,
                "model_b": b,
                "winner": winner,
                "question_id": question // 3,
                "answer_a": "x" * length[0],
                "answer_b": "x" * length[1],
            }
        )
    return rows


def test_a_rating_without_the_effect_of_length_is_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(0, 4000, 3.0)))
    plain = rank_battles(read_battles(tmp_path / "b.jsonl"), bootstraps=0)
    assert [row.model for row in plain.ratings] == ["long", "mid", "short"]
    frame = pl.read_ndjson(tmp_path / "b.jsonl").with_columns(
        pl.col("answer_a").str.len_chars().alias("length_a"), pl.col("answer_b").str.len_chars().alias("length_b")
    )
    battles = battles_of_frames([(frame.drop("answer_a", "answer_b"), "b")], with_style=True)
    ranking = rank_battles(battles, with_pairs=True)
    assert ranking.intervals == "sandwich"
    assert [row.model for row in ranking.ratings] == ["short", "mid", "long"]
    points = {row.model: row for row in ranking.ratings}
    for model, strength in (("short", 0.5), ("mid", 0.2), ("long", 0.0)):
        row = points[model]
        assert row.low is not None
        assert row.high is not None
        assert row.low <= 1000 + 400 / math.log(10) * (strength - 0.7 / 3) <= row.high
    (effect,) = ranking.style
    assert battles.style is not None
    assert effect.low is not None
    assert effect.high is not None
    assert effect.low <= 3.0 * battles.style.std() <= effect.high
    assert (effect.style, effect.component, effect.tier) == ("length", 1, 1)


def test_a_style_without_effect_leaves_ratings_and_errors_as_they_are() -> None:
    rng = np.random.default_rng(4)
    left, right = rng.integers(0, 3, 900), rng.integers(3, 6, 900)
    share = rng.choice([0.0, 0.5, 1.0], 900)
    rows = [
        (f"m{a}", f"m{b}", {1.0: "model_a", 0.5: "tie", 0.0: "model_b"}[s]) for a, b, s in zip(left, right, share, strict=True)
    ]
    frame = pl.DataFrame(rows, schema=["model_a", "model_b", "winner"], orient="row")
    plain = {row.model: row for row in rank_battles(battles_of_frames([(frame, "b")]), intervals="sandwich").ratings}
    styled, told = take_styles(left, right, share, rng.normal(0, 1, (900, 2)) * [1, 1e-3], models=6)
    assert told.all()
    found = fit_with_style(styled)
    assert np.abs(found.beta).max() < 0.3
    for model in range(6):
        row = plain[f"m{model}"]
        assert row.rating is not None
        assert row.standard_error is not None
        assert 1000 + 400 / math.log(10) * found.theta[model] == pytest.approx(row.rating, abs=6)
        error = 400 / math.log(10) * math.sqrt(found.covariance[model, model])
        assert error == pytest.approx(row.standard_error, rel=0.05)


def test_the_arenas_own_counts_and_conversations_are_read(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "# hi"},
        {"role": "assistant", "content": "- a\n- b"},
        {"role": "assistant", "content": "c"},
    ]
    row: dict[str, Any] = {"model_a": "x", "model_b": "y", "winner": "tie", "conversation_a": talk, "conversation_b": talk[:2]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(row))
    talks = read_battles(tmp_path / "talks.jsonl", with_style=True)
    assert talks.styles == ("length", "headers", "lists", "bold")
    assert talks.style is not None
    assert talks.style.tolist() == [[(9 - 7) / (9 + 7), 0, 0, 0]]
    row["conv_metadata"] = {
        "sum_assistant_a_tokens": 30,
        "sum_assistant_b_tokens": 10,
        "header_count_a": {"h1": 1, "h2": 2},
        "header_count_b": {"h1": 0, "h2": 1},
    }
    (tmp_path / "counts.jsonl").write_text(json.dumps(row))
    counts = read_battles(tmp_path / "counts.jsonl", with_style=True)
    assert (counts.styles, counts.style is not None and counts.style.tolist()) == (("length", "headers"), [[0.5, 0.5]])
    both = read_battles(tmp_path / "talks.jsonl", tmp_path / "counts.jsonl", with_style=True)
    assert both.styles == ("length", "headers")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "b tells no style: it has the columns model_a, model_b, winner"),
        ({"answer_a": ["x"], "answer_b": [None]}, "battle 1 of b tells no length_b"),
        ({"length_a": ["many"], "length_b": ["3"]}, "battle 1 of b tells no length_a"),
        ({"length_a": [2], "length_b": [-3]}, r"battle 1 of b has -3 as its length_b \(1 of 1 battles"),
        ({"length_a": ["nan"], "length_b": ["3"]}, "battle 1 of b has nan as its length_a"),
        ({"conv_metadata": [{"bold_count_a": {"**": 2, "__": 0}, "bold_count_b": None}]}, "tells no bold_b"),
    ],
)
def test_rows_without_style_are_named(columns: dict[str, Any], says: str) -> None:
    frame = pl.DataFrame({"model_a": ["x"], "model_b": ["y"], "winner": ["tie"], **columns})
    with pytest.raises(DataError, match=says):
        battles_of_frames([(frame, "b")], with_style=True)


def test_a_row_that_is_no_battle_needs_no_style() -> None:
    columns = {"model_a": ["x", "x"], "model_b": ["y", "y"], "winner": ["tie", None], "length_a": [3, None], "length_b": [1, 1]}
    battles = battles_of_frames([(pl.DataFrame(columns), "b")], with_style=True)
    assert (len(battles), battles.unread) == (1, 1)
    assert battles.style is not None
    assert battles.style.tolist() == [[0.5]]


def test_a_style_that_tells_no_more_than_who_answers_is_not_taken_out() -> None:
    rng = np.random.default_rng(0)
    left = rng.integers(0, 3, 300)
    right = (left + rng.integers(1, 3, 300)) % 3
    frame = pl.DataFrame(
        {
            "model_a": [f"m{model}" for model in left],
            "model_b": [f"m{model}" for model in right],
            "winner": rng.choice(["model_a", "model_b", "tie"], 300),
            "length_a": rng.integers(1, 99, 300),
            "length_b": rng.integers(1, 99, 300),
        }
    )
    alone = rank_battles(battles_of_frames([(frame, "b")], with_style=True))
    # Model 0 writes one header in each answer, and the others none; all bold passages are twice as many on the left, and
    # lists are as long as answers.
    frame = frame.with_columns(
        pl.Series("headers_a", left == 0).cast(pl.Int64),
        pl.Series("headers_b", right == 0).cast(pl.Int64),
        pl.lit(2).alias("bold_a"),
        pl.lit(1).alias("bold_b"),
        pl.col("length_a").alias("lists_a"),
        pl.col("length_b").alias("lists_b"),
    )
    ranking = rank_battles(battles_of_frames([(frame, "b")], with_style=True))
    assert [one.style for one in ranking.style if one.effect is not None] == ["length"]
    assert [one.style for one in ranking.style] == ["length", "headers", "lists", "bold"]
    assert ranking.ratings == alone.ratings
    facts, _ = describe(ranking)
    assert sum("style not taken out: " in line for line in facts) == 3


def test_a_weight_is_as_many_equal_battles() -> None:
    rng = np.random.default_rng(1)
    left, right, share = rng.integers(0, 2, 200), rng.integers(2, 4, 200), rng.choice([0.0, 0.5, 1.0], 200)
    styled, _ = take_styles(left, right, share, rng.normal(0, 1, (200, 1)), models=4)
    point = fit_with_style(styled)
    times = rng.integers(1, 4, 200)
    repeated = {name: np.repeat(getattr(styled, name), times, axis=0) for name in ("left", "right", "share", "x")}
    known = fit_with_style(msgspec.structs.replace(styled, **repeated))
    found = refit_with_style(styled, point, times)
    assert found == pytest.approx(np.concatenate([known.theta, known.beta]), abs=1e-5)


def test_resamples_of_style_are_as_wide_as_its_errors_and_go_by_question(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(1, 600, 2.0) for _ in range(2)))
    battles = read_battles(tmp_path / "b.jsonl", with_style=True)
    by = {
        (intervals, by_question): rank_battles(
            battles, intervals=intervals, by_question=by_question, bootstraps=300, with_pairs=True
        )
        for intervals in ("bootstrap", "sandwich")
        for by_question in (True, False)
    }
    assert by["bootstrap", True].bootstraps == 300
    widths = {}
    for key, ranking in by.items():
        ends = [(row.low, row.high) for row in (*ranking.ratings, *ranking.style)]
        widths[key] = np.array([high - low for low, high in ends if low is not None and high is not None])
        assert len(widths[key]) == 4
        assert len(ranking.pairs) == 3
    for by_question in (True, False):
        assert widths["bootstrap", by_question] == pytest.approx(widths["sandwich", by_question], rel=0.2)
    # Every battle is there twice, on one question: taken for single ones, they look surer than they are.
    assert (widths["bootstrap", True] > 1.2 * widths["bootstrap", False]).all()
    points = [[row.rating for row in ranking.ratings] for ranking in by.values()]
    assert all(one == points[0] for one in points)


def test_without_resamples_style_has_no_intervals() -> None:
    frame = pl.DataFrame(make_rows(2, 300, 1.0)).drop("question_id")
    ranking = rank_battles(battles_of_frames([(frame, "b")], with_style=True), intervals="bootstrap", bootstraps=0)
    assert {row.low for row in ranking.ratings} == {None}
    assert [(one.style, one.effect is None, one.low) for one in ranking.style if one.style == "length"] == [
        ("length", False, None)
    ]


def test_a_style_that_tells_every_winner_is_refused() -> None:
    left, right = np.zeros(4, dtype=int), np.ones(4, dtype=int)
    styled, _ = take_styles(left, right, np.array([1.0, 1.0, 0.0, 0.0]), np.array([[0.5], [0.4], [-0.4], [-0.5]]), models=2)
    with pytest.raises(DataError, match=r"no finite value|did not settle"):
        fit_with_style(styled)
