from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from chaccu.cli.main import app
from chaccu.errors import DataError, UsageError
from chaccu.judge import Review, load_questions, read_reviews, score_reviews
from chaccu.judge.score import Contradiction
from chaccu.judge.verdicts import Verdict

DATA = Path(__file__).parents[4] / "shared" / "data"
BLOG = DATA / "vicuna_blog"


def published(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"the published judgments are not there: {DATA / name}")
    return DATA / name


def write_lines(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


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
    for line, error in [
        ({"text": "8 7"}, "no question_id"),
        ({"question_id": 1, "score": [8, 7]}, "neither a text nor a winner"),
        ({"question_id": 1, "text": "8 7", "score": [8, 7, 6]}, "3 numbers"),
        ({"question_id": 1, "text": 8}, "Expected `str"),
    ]:
        with pytest.raises(DataError, match=error):
            read_reviews(write_lines(file, line))
    packed = tmp_path / "reviews.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"question_id": 1, "text": "8 7"}\n')[:-4])
    with pytest.raises(DataError, match="no whole gzip file"):
        read_reviews(packed)


def test_lines_of_several_forms_are_read_by_their_own_names(tmp_path: Path) -> None:
    verdict = Verdict(
        key="k",
        question_id=6,
        category="c",
        turn=0,
        models=("x", "y"),
        judge="j",
        prompt="pair",
        prompt_sha256="0",
        outcome="first",
        text="[[B]]",
    )
    file = write_lines(
        tmp_path / "mixed.jsonl",
        {"question_id": 1, "model": "m", "judgment": "Rating: [[7]]", "score": 7, "turn": 2, "judge": ["j", "p"]},
        {"question_id": 2, "first": "x", "second": "y", "verdict": -1, "text": "I cannot tell."},
        {"question_id": 3, "model_1": "x", "model_2": "y", "g1_judgment": "[[A]]", "g1_winner": "model_1"}
        | {"g2_judgment": "[[B]]", "g2_winner": "model_2"},
        {"index": 4, "strategy": "s", "completion_original": "Output (a)", "winner_original": "1"}
        | {"completion_swapped": None, "winner_swapped": "1"},
        {"question_id": 5, "model_a": "x", "model_b": "y", "winner": "tie (inconsistent)"},
        msgspec.to_builtins(verdict),
        {"question_id": 7, "model_a": "x", "model_b": "y", "winner": "y", "text": '{"winner": "B"}'},
        {"question_id": 8, "model": "m", "judgment": '{"score": 5}', "turn": 1},
        {"question_id": 9, "text": "Rating: [[3]]", "prompt": [{"role": "user", "content": "…"}], "review_id": None},
    )
    report = score_reviews(read_reviews(file))
    assert (report.reviews, report.parsed, len(report.unparsed), report.without_text) == (11, 8, 1, 2)
    assert report.unparsed[0].question_id == 2
    # Of the second order the file stores the winner by the first: [[B]] there is model_1.
    assert report.contradictions == [
        Contradiction(question_id=3, pair="y__x", stored="first", text="second"),
        Contradiction(question_id=6, pair="x__y", turn=0, stored="first", text="second"),
    ]
    sums = {name: (one.reviews, one.unparsed, one.scored, one.a_win, one.tie, one.b_win) for name, one in report.pairs.items()}
    assert sums == {
        "x__y": (5, 1, 0, 1, 1, 2),
        "y__x": (1, 0, 0, 0, 0, 1),
        "output_1__output_2": (1, 0, 0, 1, 0, 0),
        "output_2__output_1": (1, 0, 0, 0, 0, 1),
    }
    assert {name: one.average for name, one in report.models.items()} == {"m": 6, "all": 3}
    assert {turn: one.average for turn, one in report.models["m"].by_turn.items()} == {"2": 7, "1": 5}
    shown = CliRunner().invoke(app, ["judge", "score", str(file)])
    assert shown.exit_code == 0
    assert "11 reviews = 8 parsed + 1 unparsed + 2 without a text" in shown.stdout
    assert "m: average 6.0000 of 2 grades, unparsed 0\n  turn 1: average 5.0000" in shown.stdout
    assert "contradiction: question 6, turn 0, of x__y has first on file, and its text says second" in shown.stderr


def test_a_second_order_that_says_nothing_is_unparsed_and_named(tmp_path: Path) -> None:
    line = {
        "question_id": 1,
        "model_1": "x",
        "model_2": "y",
        "g1_judgment": "[[A]]",
        "g1_winner": "model_1",
        "g2_winner": "error",
    }
    report = score_reviews(read_reviews(write_lines(tmp_path / "one.jsonl", line)))
    assert (report.reviews, report.parsed, report.without_text, [one.pair for one in report.unparsed]) == (2, 1, 0, ["y__x"])
    assert report.pairs["y__x"].unparsed == 1


def test_a_verdict_that_was_cut_off_is_as_unread_as_when_it_was_asked() -> None:
    cut = Review(question_id=1, text="The first says [[A]] and", prompt="pair", pair="x__y", finish_reason="length")
    assert len(score_reviews([cut]).unparsed) == 1
    assert score_reviews([msgspec.structs.replace(cut, finish_reason="stop")]).pairs["x__y"].a_win == 1


def test_what_a_file_of_reviews_makes_doubtful_is_said(tmp_path: Path) -> None:
    lines = [{"question_id": str(n), "pair": "x__y", "score": [9, 8], "text": "8 9"} for n in range(30)]
    file = write_lines(tmp_path / "reviews.jsonl", *lines, lines[0])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    questions = write_lines(
        tmp_path / "questions.jsonl", *({"question_id": n, "category": "math", "turns": ["?"]} for n in range(28))
    )
    shown = CliRunner().invoke(app, ["judge", "score", str(file), "--questions", str(questions)])
    assert shown.exit_code == 0, shown.output
    assert "warning: 1 reviews say what another says" in shown.stderr
    assert "warning: 2 of 31 reviews, the first on question 28, have no category" in shown.stderr
    assert shown.stderr.count("contradiction: question") == 20
    assert "contradiction: 11 more; --out or --json names them all" in shown.stderr
    assert "  math: 232–261, 0 / 0 / 29" in shown.stdout


def test_a_grade_that_cannot_be_read_is_in_no_average() -> None:
    texts = ["[[4]]", "No grade.", "[[90]]", "[[8]]"]
    reviews = [Review(question_id=n, text=text, model="m", score=(-1,), form="grade") for n, text in enumerate(texts)]
    report = score_reviews(reviews)
    assert (report.models["m"].average, report.models["m"].unparsed) == (6, 2)
    assert [one.question_id for one in report.unparsed] == [1, 2]
    assert [one.stored for one in report.contradictions] == [(-1,), (-1,)]


def test_a_verdict_of_a_shipped_prompt_is_read_as_strictly_as_when_it_was_asked() -> None:
    texts = {"pair": "Choice: 2", "single": "[[0]]", "vicuna": "0 3", "pair-json": "[[A]]"}
    reviews = [Review(question_id=name, text=text, prompt=name, pair="x__y") for name, text in texts.items()]
    assert [one.question_id for one in score_reviews(reviews).unparsed] == ["pair", "single", "pair-json"]
    lenient = [msgspec.structs.replace(one, prompt="another", pair="") for one in reviews]
    assert score_reviews(lenient).unparsed == []


def test_published_grades_give_the_published_averages() -> None:
    expected = json.loads(published("mt_bench/expected.json").read_text())["single"]["vicuna-7b-v1.3"]
    folder = DATA / "mt_bench"
    file, questions = folder / "single_gpt4_vicuna-7b-v1.3.jsonl.gz", folder / "question.jsonl"
    shown = CliRunner().invoke(app, ["judge", "score", str(file), "--json", "--questions", str(questions)])
    report = json.loads(shown.stdout)
    grades = report["models"]["vicuna-7b-v1.3"]
    assert (grades["reviews"], grades["unparsed"]) == (expected["n"], expected["invalid"])
    assert grades["average"] == pytest.approx(expected["average"])
    assert grades["by_turn"]["1"]["average"] == pytest.approx(expected["turn1"])
    assert grades["by_turn"]["2"]["average"] == pytest.approx(expected["turn2"])
    assert {name: one["average"] for name, one in grades["by_category"].items()} == pytest.approx(expected["by_category"])
    assert report["contradictions"] == []


def test_published_choices_give_the_published_win_rates() -> None:
    expected = json.loads(published("vicuna80/expected.json").read_text())
    report = score_reviews(read_reviews(DATA / "vicuna80" / "prd_claude_judge.jsonl.gz"))
    assert (report.parsed, report.unparsed, report.contradictions) == (1600, [], [])
    wins, shown = Counter[str](), Counter[str]()
    for name, pair in report.pairs.items():
        first, second = name.split("__")
        wins[first] += pair.a_win + pair.tie / 2
        wins[second] += pair.b_win + pair.tie / 2
        shown.update({first: pair.reviews, second: pair.reviews})
    names = {"gpt4": "gpt-4", "gpt35": "gpt-3.5", "vicuna-13b": "vicuna"}
    assert {names.get(name, name): wins[name] / shown[name] for name in shown} == pytest.approx(expected["claude"])
    assert sum(pair.a_win for pair in report.pairs.values()) / 1600 == pytest.approx(expected["first_rate"])
    assert sum(pair.b_win for pair in report.pairs.values()) / 1600 == pytest.approx(expected["second_rate"])


def test_published_completions_state_what_is_on_file_but_for_eight() -> None:
    report = score_reviews(read_reviews(published("llmbar/verdicts.jsonl.gz")))
    assert (report.reviews, report.parsed, report.without_text) == (2400, 1999, 400)
    assert [(one.question_id, one.review_id) for one in report.unparsed] == [(17, "CoT")]
    # Each of these ends with "Output (b) is better", and (a) is on file.
    assert {(one.review_id, one.stored, one.text) for one in report.contradictions} == {("Swap_CoT", "first", "second")}
    assert [(one.question_id, one.pair.startswith("output_2")) for one in report.contradictions] == [
        (7, False),
        (13, False),
        (30, True),
        (33, False),
        (64, True),
        (96, False),
        (96, True),
        (97, True),
    ]


def test_winners_without_a_text_are_counted_apart() -> None:
    report = score_reviews(read_reviews(published("mt_bench/sample_gpt4_pair_q81-90.jsonl")))
    assert (report.reviews, report.parsed, report.unparsed, report.without_text) == (300, 0, [], 300)
    assert sum(pair.a_win + pair.tie + pair.b_win for pair in report.pairs.values()) == 300


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


def test_reviews_are_battles_that_a_ranking_reads(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "reviews.jsonl",
        {"question_id": 1, "model_a": "x", "model_b": "y", "text": "8 7", "category": "math", "review_id": "r1"},
        {"question_id": "q", "pair": "y__z", "text": "[[C]]", "turn": 2},
        {"question_id": 3, "model_1": "x", "model_2": "z", "g1_judgment": "[[A]]", "g1_winner": "model_1"}
        | {"g2_judgment": "[[B]]", "g2_winner": "model_1"},
        {"question_id": 4, "model_a": "x", "model_b": "y", "winner": "y"},
        {"question_id": 5, "model_a": "x", "model_b": "y", "text": "I cannot tell."},
        {"question_id": 6, "model": "x", "text": "[[7]]", "score": 7},
        {"question_id": 7, "text": "2 9"},
        {"question_id": 8, "model_a": "x", "model_b": "x", "text": "2 9"},
    )
    battles = tmp_path / "battles.jsonl"
    shown = CliRunner().invoke(app, ["judge", "score", str(file), "--battles", str(battles), "--json"], catch_exceptions=False)
    assert "9 reviews = 6 battles (1 without a winner) + 1 grades + 2 that name no two models" in shown.stderr
    assert json.loads(shown.stdout)["reviews"] == 9
    rows = [json.loads(line) for line in battles.read_text().splitlines()]
    assert [(row["question_id"], row["model_a"], row["model_b"], row["winner"]) for row in rows] == [
        ("1", "x", "y", "model_a"),
        ("q", "y", "z", "tie"),
        ("3", "x", "z", "model_a"),
        ("3", "z", "x", "model_b"),
        ("4", "x", "y", "model_b"),
        ("5", "x", "y", None),
    ]
    assert (rows[0]["category"], rows[0]["review_id"], rows[1]["turn"]) == ("math", "r1", 2)
    ranked = json.loads(CliRunner().invoke(app, ["rank", str(battles), "--json"], catch_exceptions=False).stdout)
    assert (ranked["battles"], ranked["ties"], ranked["unread"], ranked["questions"]) == (5, 1, 1, 4)


def test_battles_of_nothing_and_files_of_another_end_are_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "reviews.jsonl", {"question_id": 6, "model": "x", "text": "[[7]]", "score": 7})
    for end, error, says in (("csv", UsageError, r"b\.csv ends in \.csv"), ("jsonl", DataError, "none of 1 reviews")):
        with pytest.raises(error, match=says):
            CliRunner().invoke(
                app, ["judge", "score", str(file), "--battles", str(tmp_path / f"b.{end}")], catch_exceptions=False
            )
        assert not (tmp_path / f"b.{end}").exists()


def test_reviews_are_not_replaced_by_what_is_made_of_them(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "reviews.jsonl", {"question_id": 1, "model_a": "x", "model_b": "y", "text": "8 7"})
    before = file.read_text()
    for option in ("--out", "--battles"):
        with pytest.raises(UsageError, match="is read, and would be replaced"):
            CliRunner().invoke(app, ["judge", "score", str(file), option, str(file)], catch_exceptions=False)
    assert file.read_text() == before


def test_published_reviews_are_ranked_by_their_texts(tmp_path: Path) -> None:
    published("vicuna_blog/reviews.jsonl")
    battles = tmp_path / "battles.jsonl"
    shown = CliRunner().invoke(app, ["judge", "score", str(BLOG / "reviews.jsonl"), "--battles", str(battles), "--json"])
    pairs = json.loads(shown.stdout)["pairs"]
    ranked = json.loads(CliRunner().invoke(app, ["rank", str(battles), "--json"]).stdout)
    assert ranked["battles"] == sum(pair["a_win"] + pair["tie"] + pair["b_win"] for pair in pairs.values())
    assert ranked["questions"] == 80
    wins = {row["model"]: row["wins"] for row in ranked["ratings"]}
    for model, won in wins.items():
        named = [(name.split("__"), pair) for name, pair in pairs.items()]
        assert won == sum(pair["a_win"] * (both[0] == model) + pair["b_win"] * (both[1] == model) for both, pair in named)
