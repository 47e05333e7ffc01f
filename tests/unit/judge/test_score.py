from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from chaccu.errors import DataError
from chaccu.judge import Review, load_questions, parse_scores, read_reviews, score_reviews

BLOG = Path(__file__).parents[4] / "shared" / "data" / "vicuna_blog"


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7\nBoth are fine.", (8, 7)),
        ("  8.5, 7  \nThe first is better.", (8.5, 7)),
        ("(9, 4)", (9, 4)),
        ("**8 7**\n\nGood.", (8, 7)),
        ("Scores: 8/10 6.5/10", (8, 6.5)),
        ("10 10", (10, 10)),
        ("I solve it first.\n\nAssistant 1: 10\nAssistant 2: 4\n\nThe first is right.", (10, 4)),
        ("Assistant 1: 2 (wrong steps)\n\nSome words.\nAssistant 2: 1 (no steps)", (2, 1)),
        ("**Assistant 1:** 7\n**Assistant 2:** 9", (7, 9)),
        ("In conclusion, the scores are (1, 5) for the two.", (1, 5)),
        ("The output tuple is (10, 1). The first did better.", (10, 1)),
        ("I would give Assistant 1 a score of 10 and Assistant 2 a score of 1.", (10, 1)),
        ("5 5\nOn second thought the first is wrong.\n3 8", (3, 8)),
        ("The points are (2, -2) and (10, 4).\nThe output tuple is (6, 9). Recall that (x2, y2) = (10, 4).", (6, 9)),
    ],
)
def test_stated_scores_are_read(text: str, scores: tuple[float, float]) -> None:
    assert parse_scores(text) == scores


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Both answers are good.",
        "We have the points (2, -2) and (10, 4), so the length is 10.",
        "The score depends on (x2, y2) = (10, 4).",
        "80 70",
        "8",
        "8/10",
        "In 2023 there were 8 7-year cycles.",
        "5 * 8 - 2",
        "2 ** 3",
        "Assistant 1: 10 units long\nAssistant 2: 8 units long",
        "11 4",
    ],
)
def test_other_numbers_are_no_scores(text: str) -> None:
    assert parse_scores(text) is None


def test_unparsed_and_contradicting_reviews_are_counted_and_named() -> None:
    reviews = [
        Review(question_id=1, text="8 7", model_a="x", model_b="y", score=(8, 7), category="math"),
        Review(question_id=2, text="no verdict", model_a="x", model_b="y", review_id="r2"),
        Review(question_id=3, text="Thoughts.\n4 4", model_a="x", model_b="y", score=(5, 4), review_id="r3"),
        Review(question_id="q", text="1 2", pair="p"),
    ]
    report = score_reviews(reviews)
    assert (report.reviews, report.parsed, report.unlike_first_line) == (4, 3, 1)
    assert [(one.question_id, one.pair, one.review_id) for one in report.unparsed] == [(2, "x__y", "r2")]
    assert [(one.review_id, one.stored, one.text) for one in report.contradictions] == [("r3", (5, 4), (4, 4))]
    pair = report.pairs["x__y"]
    assert (pair.reviews, pair.unparsed, pair.total, pair.a_win, pair.tie, pair.b_win) == (3, 1, (12, 11), 1, 1, 0)
    assert pair.ratio_b_over_a == pytest.approx(11 / 12)
    assert pair.by_category["math"].total == (8, 7)
    assert report.pairs["p"].b_win == 1
    assert b"-1" not in msgspec.json.encode(report)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "reviews.jsonl"
    file.write_text('{"question_id": 1, "text": "8 7"}\n{"question_id": 2}\n')
    with pytest.raises(DataError, match=r"line 2 of .* is no review"):
        read_reviews(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no review"):
        read_reviews(file)


def test_published_reviews_give_the_published_totals() -> None:
    if not BLOG.is_dir():
        pytest.skip(f"the published reviews are not there: {BLOG}")
    expected = json.loads((BLOG / "expected.json").read_text())["pairs"]
    category = {one.question_id: one.category for one in load_questions(str(BLOG / "questions.jsonl"))}
    reviews = [msgspec.structs.replace(one, category=category[one.question_id]) for one in read_reviews(BLOG / "reviews.jsonl")]
    report = score_reviews(reviews)
    assert report.unparsed == []
    assert report.contradictions == []
    assert report.unlike_first_line == sum(pair["first_line_parse_failures"] for pair in expected.values())
    assert set(report.pairs) == set(expected)
    for name, known in expected.items():
        found = report.pairs[name]
        assert (found.reviews, list(found.total)) == (known["n"], known["total"])
        assert (found.a_win, found.tie, found.b_win) == (known["a_win"], known["tie"], known["b_win"])
        assert found.ratio_b_over_a == pytest.approx(known["ratio_b_over_a"], abs=1e-6)
        for one, sums in known["by_category"].items():
            part = found.by_category[one]
            assert (part.reviews, list(part.total)) == (sums["n"], sums["total"])
            assert (part.a_win, part.tie, part.b_win) == (sums["a_win"], sums["tie"], sums["b_win"])


def test_a_stored_score_never_replaces_the_text() -> None:
    if not BLOG.is_dir():
        pytest.skip(f"the published reviews are not there: {BLOG}")
    reviews = read_reviews(BLOG / "reviews.jsonl")
    turned = [msgspec.structs.replace(one, score=(0.0, 0.0)) for one in reviews]
    assert score_reviews(turned).pairs == score_reviews(reviews).pairs
    assert len(score_reviews(turned).contradictions) == len(reviews)
