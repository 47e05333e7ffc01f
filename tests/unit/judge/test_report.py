"""What verdicts come to, with figures worked out by hand; and the pages that show them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from made_up_verdicts import both_orders, verdict, write_lines
from typer.testing import CliRunner

from chaccu.artifact import Manifest, write_manifest
from chaccu.cli.judge import app
from chaccu.errors import DataError, StorageError, UsageError
from chaccu.judge.answers import Answer
from chaccu.judge.checking import CheckedQuestion, count_checks
from chaccu.judge.judged_folder import read_judged
from chaccu.judge.plots import draw_heat_map, draw_radar
from chaccu.judge.report import JudgeReport, build_report
from chaccu.judge.report_pages import render_html, render_markdown, write_report
from chaccu.judge.tallies import ALL, compare_all, tally_grades, tally_pairs, total_scores
from chaccu.judge.verdicts import Verdict
from chaccu.testing.answers import build_answer


def failure(models: tuple[str, ...], question: int, **fields: Any) -> dict[str, Any]:
    place = {"question_id": question, "category": "math", "turn": 0, "models": models, "judge": "j", "prompt": "pair"}
    return {**place, "cause": "time-out", "message": "no answer", **fields}


def answer(model: str, question: int, chars: int) -> Answer:
    return build_answer(question, model, "x" * chars, category="math", tokens=None)


@pytest.fixture
def verdicts() -> list[Verdict]:
    """Of a against b: five questions of math (2 won, 1 lost, 1 tied, 1 flip), two of writing (1 won, 1 unparsed)."""
    math = [("a", 1), ("a", 2), ("b", 3), ("tie", 4), ("flip", 5)]
    found = [one for winner, question in math for one in both_orders("a", "b", winner, question)]
    found += both_orders("a", "b", "a", 6, category="writing")
    return [
        *found,
        *(verdict(*models, said, 7, category="writing") for *models, said in [("a", "b", "first"), ("b", "a", None)]),
    ]


@pytest.fixture
def folder(tmp_path: Path, verdicts: list[Verdict]) -> Path:
    write_lines(tmp_path / "run" / "verdicts.jsonl", verdicts)
    # One order of question 8 was answered and the other was not; of question 9 neither.
    write_lines(tmp_path / "run" / "failures.jsonl", [failure(("b", "a"), 8), failure(("a", "b"), 9), failure(("b", "a"), 9)])
    write_lines(tmp_path / "run" / "verdicts.jsonl", [*verdicts, verdict("a", "b", "first", 8)])
    return tmp_path / "run"


def report_of(folder: Path, **options: Any) -> JudgeReport:
    return build_report(read_judged([folder]), **options)


def test_wins_ties_losses_flips_and_what_is_missing_stay_apart(folder: Path) -> None:
    report = report_of(folder)
    whole, math, writing = report.pairs
    assert (whole.model, whole.other, whole.category) == ("a", "b", ALL)
    assert (whole.wins, whole.ties, whole.losses, whole.flips) == (3, 2, 1, 1)
    assert (whole.counted, whole.unparsed, whole.failed, whole.asked) == (6, 1, 2, 9)
    assert whole.win_rate.value == pytest.approx(4 / 6)
    assert (whole.win.value, whole.tie.value, whole.loss.value) == (0.5, 2 / 6, 1 / 6)
    assert (whole.win_rate.n, whole.win_rate.questions) == (6, 6)
    assert (math.wins, math.ties, math.losses, math.failed) == (2, 2, 1, 2)
    assert (writing.category, writing.wins, writing.counted, writing.unparsed) == ("writing", 1, 1, 1)
    assert report.asked == report.parsed + report.unparsed + report.failed + report.lost
    assert (report.asked, report.parsed, report.unparsed, report.failed) == (18, 14, 1, 3)
    assert report.judges[0].causes == {"time-out": 3}


def test_a_baseline_is_what_the_others_are_set_against(folder: Path) -> None:
    against = report_of(folder, baseline="a").pairs[0]
    assert (against.model, against.other, against.wins, against.losses) == ("b", "a", 1, 3)
    assert against.win_rate.value == pytest.approx(2 / 6)
    with pytest.raises(UsageError, match="no verdict is on the model 'c'"):
        report_of(folder, baseline="c")


def test_totals_are_the_vicuna_way(verdicts: list[Verdict]) -> None:
    scored = [
        verdict("a", "b", "first", 1, scores=(9.0, 8.0)),
        verdict("b", "a", "second", 1, scores=(6.0, 7.0)),  # a: 8, b: 7
        verdict("a", "b", "second", 2, scores=(4.0, 8.0)),
        verdict("a", "b", None, 3),
    ]
    (total,) = total_scores(scored)
    assert (total.model, total.total, total.reference, total.reference_total, total.n) == ("a", 12.0, "b", 15.0, 2)
    assert total.share.value == pytest.approx(0.8)
    (turned,) = total_scores(scored, baseline="a")
    assert (turned.model, turned.total, turned.share.value) == ("b", 15.0, pytest.approx(1.25))
    assert total_scores(verdicts) == []
    graded = [verdict("a", None, 6, 1), verdict("b", None, 8, 1), verdict("a", None, 9, 2), verdict("b", None, None, 2)]
    (single,) = total_scores(graded, baseline="b")
    assert (single.total, single.reference_total, single.n) == (6.0, 8.0, 1)
    assert total_scores(graded) == []


def test_large_totals_are_shown_to_the_half(tmp_path: Path) -> None:
    write_lines(tmp_path / "verdicts.jsonl", [verdict("a", "b", "first", 1, scores=(1_900_009.5, 8.0))])
    report = report_of(tmp_path)
    assert "1900009.5" in render_markdown(report)
    assert "1900009.5" in render_html(report)


def test_grades_by_category_and_turn_leave_out_what_is_unparsed() -> None:
    grades = [
        verdict("a", None, 6, 1),
        verdict("a", None, 8, 1, turn=1),
        verdict("a", None, 4, 2, category="art"),
        verdict("a", None, None, 3, category="art"),
    ]
    found = {(one.category, one.turn): one for one in tally_grades(grades, [])}
    assert found[ALL, None].mean.value == 6.0
    assert (found[ALL, None].mean.n, found[ALL, None].unparsed) == (3, 1)
    assert (found["art", None].mean.value, found["math", None].mean.value) == (4.0, 7.0)
    assert (found[ALL, 0].mean.value, found[ALL, 1].mean.value) == (5.0, 8.0)


def test_several_judges_are_compared_and_joined() -> None:
    said = {"j": ["a", "a", "b", "tie"], "k": ["a", "b", "b", "a"]}
    verdicts = [
        one
        for judge, winners in said.items()
        for question, winner in enumerate(winners)
        for one in both_orders("a", "b", winner, question, judge=judge)
    ]
    tallies = tally_pairs(compare_all(verdicts, []))
    assert [(one.judge, one.wins, one.ties, one.losses) for one in tallies] == [(ALL, 4, 1, 3), ("j", 2, 1, 1), ("k", 2, 0, 2)]
    # Two judges on a question are no two questions.
    assert (tallies[0].win_rate.n, tallies[0].win_rate.questions) == (8, 4)


def test_the_longer_answer_and_the_rules_are_counted(folder: Path) -> None:
    lengths = {1: (100, 50), 2: (10, 11), 3: (120, 100), 4: (10, 10), 5: (10, 30)}
    write_lines(
        folder / "answers.jsonl",
        [answer(model, question, both[side]) for question, both in lengths.items() for side, model in enumerate("ab")],
    )
    outcomes = [("a", 1, "passed"), ("a", 2, "failed"), ("a", 3, "missing"), ("b", 1, "passed")]
    checks = [{"question_id": q, "category": "math", "model": m, "outcome": outcome} for m, q, outcome in outcomes]
    write_lines(folder / "checks.jsonl", checks)
    report = report_of(folder)
    (found,) = report.verbosity
    # Longer: a wins 1; shorter a wins 2; longer a loses 3; 4 is equal; the flip 5 is half a win.
    assert (found.equal, found.unknown, found.longer_wins.n) == (1, 1, 4)
    assert found.longer_wins.value == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert [bucket.win_rate.n for bucket in found.buckets] == [1, 1, 1, 1]
    (controlled,) = report.length_controlled
    assert (controlled.n, controlled.figures) == (4, None)
    assert "4 comparisons of unequal length are too few" in render_markdown(report)
    assert [(one.model, one.chars) for one in report.lengths] == [("a", 50.0), ("b", 201 / 5)]
    assert (report.checks[0].passed, report.checks[0].failed, report.checks[0].missing, report.checks[0].share) == (
        1,
        1,
        1,
        0.5,
    )


def test_three_judges_are_compared_two_by_two_and_all_together(tmp_path: Path) -> None:
    said = {"j": ["a", "a", "b", "tie"], "k": ["a", "b", "b", "a"], "l": ["a", "a", "b"]}
    lines = [
        one
        for judge, winners in said.items()
        for question, winner in enumerate(winners)
        for one in both_orders("a", "b", winner, question, judge=judge)
    ]
    write_lines(tmp_path / "verdicts.jsonl", lines)
    report = report_of(tmp_path)
    assert report.ensemble is not None
    found = [
        (one.judge, one.other, one.with_ties.agree, one.with_ties.total, one.no_ties.total) for one in report.ensemble.pairs
    ]
    assert found == [("j", "k", 2, 4, 3), ("j", "l", 3, 3, 3), ("k", "l", 2, 3, 3)]
    # By hand: units aaa, aba, bbb, (tie, a). D_o = (2·2/2 + 2)/11, D_e of 6 a, 4 b, 1 tie = 2·(24 + 6 + 4)/110.
    assert report.ensemble.alpha == pytest.approx(1 - (4 / 11) / (68 / 110))
    assert [one.judge for one in report.pairs] == [ALL, "j", "k", "l"]
    assert "alpha of winners 0.412" in render_html(report)
    with pytest.raises(DataError, match="a judge is named 'all'"):
        tally_pairs(compare_all([*lines, *both_orders("a", "b", "a", 1, judge="all")], []))


def test_what_has_the_name_of_everything_counts_once(tmp_path: Path) -> None:
    lines = [one for q in range(4) for one in both_orders("a", "b", "a", q, category="all" if q else "art")]
    write_lines(tmp_path / "verdicts.jsonl", [*lines, verdict("a", None, 7, 1, category="all"), verdict("a", None, 5, 2)])
    report = report_of(tmp_path)
    assert [(one.category, one.counted) for one in report.pairs] == [(ALL, 4), ("all (a category)", 3), ("art", 1)]
    shares = {(one.model, one.category): one.win_rate.n for one in report.by_category}
    assert (shares["a", ALL], shares["a", "all (a category)"], shares["a", "art"]) == (4, 3, 1)
    assert [(one.category, one.mean.n) for one in report.grades] == [(ALL, 2), ("all (a category)", 1), ("math", 1)]
    checked = count_checks([CheckedQuestion(question_id=1, category="all", model="a", outcome="passed")])
    assert [(one.category, one.passed) for one in checked] == [(ALL, 1), ("all (a category)", 1)]


def test_several_prompts_on_one_thing_are_told_apart_and_warned_of(tmp_path: Path) -> None:
    lines = [
        *both_orders("a", "b", "a", 1),
        *both_orders("a", "b", "b", 1, prompt="mine"),
        *both_orders("a", "b", "b", 2, prompt="mine", prompt_sha256="b" * 64),
        *(
            verdict(model, None, grade, 1, prompt=prompt)
            for model, grade, prompt in [("a", 4, "p"), ("a", 8, "q"), ("b", 6, "p")]
        ),
    ]
    write_lines(tmp_path / "verdicts.jsonl", lines)
    report = report_of(tmp_path, baseline="b")
    assert report.ensemble is not None
    (pair, *others) = [one for one in report.ensemble.pairs if one.with_ties.total]
    assert (pair.judge, pair.other, pair.with_ties.agree, pair.with_ties.total, others) == ("j by mine", "j by pair", 0, 1, [])
    assert [(one.total, one.reference_total) for one in report.totals] == [(6.0, 6.0)]
    assert report.judges[0].prompts["mine"] == ["a" * 64, "b" * 64]
    said = "\n".join(report.warnings)
    assert "The prompt mine of j is 2 texts of that name" in said
    assert "j judged the same answers by several prompts (mine, p, pair, q)" in said
    assert f"mine {'a' * 12} {'b' * 12}" in render_html(report)


def test_a_folder_that_is_named_twice_counts_once(folder: Path) -> None:
    write_manifest(folder, Manifest(kind="verdicts", name="run", facts={"asked": 20}))
    checks = [{"question_id": 1, "category": "math", "model": "a", "outcome": "passed"}]
    write_lines(folder / "checks.jsonl", checks)
    write_lines(folder / "answers.jsonl", [answer("a", 1, 3)])
    judged = read_judged([folder, folder / ".." / folder.name], [folder])
    assert (judged.lost, judged.repeated, len(judged.checks)) == (2, 0, 1)


def test_a_win_rate_at_equal_length_where_there_is_enough(tmp_path: Path) -> None:
    # The longer answer always wins, and a is longer in three of four: at equal length they are even.
    longer = ["a", "a", "a", "b"] * 10
    write_lines(tmp_path / "verdicts.jsonl", [one for q, w in enumerate(longer, 1) for one in both_orders("a", "b", w, q)])
    write_lines(
        tmp_path / "answers.jsonl",
        [answer(model, q, 100 + 100 * (model == winner)) for q, winner in enumerate(longer, 1) for model in "ab"],
    )
    report = report_of(tmp_path)
    (found,) = report.length_controlled
    assert found.figures is not None
    assert report.pairs[0].win_rate.value == 0.75
    assert abs(found.figures.win_rate - 0.5) < 0.15
    assert "win rate at equal length" in render_html(report)


def test_a_verdict_in_two_folders_counts_once_and_heals_a_failure(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "more" / "verdicts.jsonl", [verdict("b", "a", "second", 8), verdict("a", "b", "first", 8)])
    report = build_report(read_judged([folder, tmp_path / "more"]))
    assert (report.repeated, report.failed) == (1, 2)
    assert (report.pairs[0].wins, report.pairs[0].failed) == (4, 1)


def test_equal_ids_of_other_questions_are_warned_of(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "more" / "verdicts.jsonl", [verdict("a", "b", "second", 1, key="of another set")])
    report = build_report(read_judged([folder, tmp_path / "more"]))
    assert any("1 verdicts are on a question id" in one for one in report.warnings)
    assert not any("on a question id" in one for one in report_of(folder).warnings)


def test_what_a_manifest_speaks_of_and_the_files_lack_is_lost(folder: Path) -> None:
    write_manifest(folder, Manifest(kind="verdicts", name="run", facts={"asked": 20}))
    report = report_of(folder)
    assert (report.asked, report.lost) == (20, 2)
    assert any("2 of 20 verdicts" in warning for warning in report.warnings)


@pytest.mark.parametrize("lines", [[], [verdict("a", "b", None)], [verdict("a", None, 7)], [verdict("a", "b", "tie")]])
def test_empty_and_tiny_inputs_are_reported_in_words(tmp_path: Path, lines: list[Verdict]) -> None:
    write_lines(tmp_path / "verdicts.jsonl", lines)
    report = report_of(tmp_path)
    assert report.warnings
    assert "Judgement of" in render_html(report)
    assert f"{len(lines)} verdicts asked" in render_markdown(report)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is no judging folder"):
        read_judged([tmp_path])
    with pytest.raises(StorageError, match="there is no file"):
        read_judged([tmp_path / "none"])
    write_lines(tmp_path / "verdicts.jsonl", [])
    (tmp_path / "failures.jsonl").write_text("half a li")
    with pytest.raises(DataError, match=r"line 1 of .*failures\.jsonl is no failure"):
        read_judged([tmp_path])


def several_models() -> list[Verdict]:
    names, categories = ["<b>big & bold</b>", "mid|dle", "small"], ["art", "code", "math", "write"]
    return [
        one
        for number, category in enumerate(categories * 6)
        for place, model in enumerate(names)
        for other in names[place + 1 :]
        for one in both_orders(
            model, other, [model, other, "tie", "flip", model][(number + place) % 5], number, category=category
        )
    ]


def test_the_pages_are_self_contained_escaped_and_equal_each_time(tmp_path: Path) -> None:
    write_lines(tmp_path / "verdicts.jsonl", several_models())
    first = write_report(report_of(tmp_path), tmp_path / "one")
    again = write_report(report_of(tmp_path), tmp_path / "two")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    page = (tmp_path / "one" / "report.html").read_text()
    assert not re.search(r"(?i)\b(?:src|href|url\(|@import|<script|<link|https?:)", page)
    assert "<b>big" not in page
    assert "&lt;b&gt;big &amp; bold&lt;/b&gt;" in page
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        root = ET.fromstring(plot)
        ids = root.attrib["aria-labelledby"].split()
        assert [child.attrib.get("id") for child in root[:2]] == ids
        assert root[1].text is not None
        assert "small: " in root[1].text
    markdown = (tmp_path / "one" / "report.md").read_text()
    assert r"mid\|dle" in markdown
    # Every row of a table has as many cells as its head.
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert json.loads((tmp_path / "one" / "report.json").read_bytes())["asked"] == 24 * 3 * 2


def test_plots_tell_lines_apart_without_colour_and_are_left_out_where_they_say_nothing() -> None:
    lines = [("a", [0.5, None, 1.0]), ("b", [0.1, 0.2, 0.3])]
    radar = draw_radar("r", "T", ["x", "y", "z"], lines, top=1.0, unit="%")
    assert 'stroke-dasharray="7 4"' in radar
    assert "a: x 50 %, y –, z 100 %" in radar
    assert draw_radar("r", "T", ["x", "y"], [("a", [1.0, 1.0])], top=1.0, unit="%") == ""
    assert draw_radar("r", "T", ["x", "y", "z"], lines * 4, top=1.0, unit="%") == ""
    assert draw_heat_map("h", "T", [], [], [], top=1.0, unit="%") == ""


def test_six_lines_differ_in_dash_and_mark_and_long_names_are_cut() -> None:
    radar = draw_radar("r", "T", ["x" * 30, "y", "z"], [(name * 60, [0.5, 0.5, 0.5]) for name in "abcdef"], top=1.0, unit="%")
    root = ET.fromstring(radar.replace("&lt;", "&amp;lt;"))
    legend = [one for one in root.iter("line") if "line" in one.attrib["class"].split()]
    assert len({one.attrib["stroke-dasharray"] for one in legend}) == 6
    # The ring of the sixth is hollow by its class, which a style sheet cannot fill again.
    assert 'class="mark line5 hollow"' in radar
    assert f">{'x' * 14}…<title>{'x' * 30}</title>" in radar
    assert f">{'a' * 27}…<title>{'a' * 60}</title>" in radar
    heat = draw_heat_map("h", "T", ["m" * 500], ["c" * 500], [[0.5]], top=1.0, unit="%")
    assert float(ET.fromstring(heat).attrib["width"]) < 1000


def test_grades_of_a_wider_scale_stay_within_the_plot(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "verdicts.jsonl", [verdict("a", None, 20 * number, number, category=f"c{number}") for number in range(1, 5)]
    )
    page = render_html(report_of(tmp_path))
    assert ">80.0</text>" in page
    points = [
        float(one)
        for found in re.findall(r'class="line line0"[^>]* points="([^"]*)"', page)
        for one in re.findall(r"[\d.]+", found)
    ]
    assert points
    assert max(points) < 560


def test_the_command_writes_where_it_is_told_and_says_the_sums(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "a against b, by j: win rate 66.7 %" in result.stdout
    assert "18 asked = 14 parsed + 1 unparsed + 3 failed" in result.stdout
    assert "warning: The verdicts are on" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.md", "report.html"}
    printed = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "out"), "--json"]).stdout
    assert json.loads(printed) == json.loads((tmp_path / "out" / "report.json").read_bytes())
