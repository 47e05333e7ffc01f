from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from chaccu.errors import DataError
from chaccu.rank import battles_of_frames, rank_battles, read_battles
from chaccu.rank.style import count_style
from chaccu.rank.style_control import fit_with_style


def test_styles_are_counted_outside_of_code() -> None:
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
    found = fit_with_style(left, right, share, rng.normal(0, 1, (900, 2)) * [1, 1e-3], models=6)
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
    ],
)
def test_rows_without_style_are_named(columns: dict[str, Any], says: str) -> None:
    frame = pl.DataFrame({"model_a": ["x"], "model_b": ["y"], "winner": ["tie"], **columns})
    with pytest.raises(DataError, match=says):
        battles_of_frames([(frame, "b")], with_style=True)


def test_a_style_that_tells_nothing_or_everything_is_refused() -> None:
    left, right = np.zeros(4, dtype=int), np.ones(4, dtype=int)
    share = np.array([1.0, 1.0, 0.0, 0.0])
    with pytest.raises(DataError, match="style 2 of 2 is the same in every battle"):
        fit_with_style(left, right, share, np.array([[1.0, 0], [0, 0], [1, 0], [0, 0]]), models=2)
    with pytest.raises(DataError, match=r"no finite value|did not settle"):
        fit_with_style(left, right, share, np.array([[0.5], [0.4], [-0.4], [-0.5]]), models=2)
