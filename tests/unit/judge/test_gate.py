"""The gate lets through what is surely better, and nothing on too little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up_verdicts import both_orders, verdict, write_lines
from typer.testing import CliRunner, Result

from chaccu.artifact import Manifest, write_manifest
from chaccu.cli.judge import app


def gate(folder: Path, candidate: str = "new", *more: str) -> Result:
    return CliRunner().invoke(app, ["gate", candidate, "--against", "old", "--verdicts", str(folder), *more])


def write(folder: Path, winners: list[str], judge: str = "j") -> None:
    """One question for each winner; "?" could not be read in one order."""
    lines = []
    for question, winner in enumerate(winners):
        if winner == "?":
            lines += [verdict("new", "old", "first", question), verdict("old", "new", None, question)]
        else:
            lines += both_orders("new", "old", winner, question, judge=judge)
    write_lines(folder / "verdicts.jsonl", lines)


@pytest.mark.parametrize(
    ("winners", "code"),
    [
        (["new"] * 30 + ["old"] * 10, 0),
        (["new"] * 22 + ["old"] * 18, 1),  # ahead, and by no more than chance may do
        (["tie"] * 40, 1),
        (["flip"] * 40, 1),
        (["old"] * 40, 1),
        (["new"] * 5, 1),  # Wilson: 5 / (5 + 1.96²) = 0.57; but five heads come once in 32 times
        (["new"] * 6, 0),  # once in 64: below 2.5 %
        (["new"] * 4 + ["tie"] * 30, 1),  # ties make neither more nor less of four wins
        (["new"] * 6 + ["tie"] * 30, 0),
        (["new"] * 30 + ["?"], 0),
        (["new"] * 30 + ["?"] * 2, 2),
        (["?"], 2),
    ],
)
def test_exit_codes(tmp_path: Path, winners: list[str], code: int) -> None:
    write(tmp_path, winners)
    result = gate(tmp_path)
    assert result.exit_code == code, result.output
    assert {0: ": promoted", 1: ": not promoted", 2: ": incomplete"}[code] in result.stdout


def test_the_limits_can_be_set(tmp_path: Path) -> None:
    write(tmp_path, ["new"] * 30 + ["old"] * 10 + ["?"] * 5)
    assert gate(tmp_path).exit_code == 2
    assert gate(tmp_path, "new", "--max-missing", "0.2").exit_code == 0
    assert gate(tmp_path, "new", "--max-missing", "0.2", "--min-win-rate", "0.7").exit_code == 1
    assert gate(tmp_path, "new", "--max-missing", "0.2", "--min-win-rate", "0.6").exit_code == 1
    assert gate(tmp_path, "new", "--max-missing", "0.2", "--min-win-rate", "0.6", "--confidence", "0.8").exit_code == 0


def test_the_decision_as_json(tmp_path: Path) -> None:
    write(tmp_path, ["new"] * 30 + ["old"] * 8 + ["tie"] * 2)
    result = gate(tmp_path, "new", "--json")
    found = json.loads(result.stdout)
    assert (found["decision"], found["asked"], found["missing"]) == ("promoted", 40, 0)
    assert found["tally"]["win_rate"]["value"] == pytest.approx(31 / 40)
    assert 0.5 < found["low"] <= found["tally"]["win_rate"]["low"]
    assert found["unfinished"] == [tmp_path.name]
    assert "warning: no manifest.json" in gate(tmp_path).stderr
    assert gate(tmp_path, "new", "--json").stdout == result.stdout


def test_what_a_killed_run_has_lost_is_missing(tmp_path: Path) -> None:
    write(tmp_path, ["new"] * 30)
    write_manifest(tmp_path, Manifest(kind="verdicts", name="run", facts={"asked": 64}))
    assert gate(tmp_path).exit_code == 2
    write_manifest(tmp_path, Manifest(kind="verdicts", name="run", facts={"asked": 60}))
    assert gate(tmp_path).exit_code == 0
    assert gate(tmp_path).stderr == ""
    # Shown in one order only, where the others were shown in both.
    write_lines(
        tmp_path / "verdicts.jsonl",
        [
            *(one for q in range(30) for one in both_orders("new", "old", "new", q)),
            *(verdict("new", "old", "first", q) for q in range(30, 40)),
        ],
    )
    assert gate(tmp_path).exit_code == 2


def test_folders_of_different_questions_with_equal_ids_are_warned_of(tmp_path: Path) -> None:
    write(tmp_path / "one", ["new"] * 30)
    write_lines(tmp_path / "two" / "verdicts.jsonl", [verdict("new", "old", "first", 3, key="of another set")])
    result = gate(tmp_path / "one", "new", "--verdicts", str(tmp_path / "two"))
    assert result.exit_code == 0
    assert "warning: 1 verdicts have the ids of earlier ones" in result.stderr


def test_a_judge_can_be_chosen_and_wrong_names_are_wrong_use(tmp_path: Path) -> None:
    lines = [
        one
        for judge, winner in (("j", "new"), ("k", "old"))
        for q in range(20)
        for one in both_orders("new", "old", winner, q, judge=judge)
    ]
    write_lines(tmp_path / "verdicts.jsonl", lines)
    assert gate(tmp_path).exit_code == 1
    assert gate(tmp_path, "new", "--judge", "j").exit_code == 0
    assert gate(tmp_path, "new", "--judge", "k").exit_code == 1
    for candidate, more, words in (
        ("neu", (), "no comparison has the model 'neu'"),
        ("old", (), "compared with itself"),
        ("new", ("--judge", "x"), "no comparison is by the judge 'x'"),
    ):
        result = gate(tmp_path, candidate, *more)
        assert getattr(result.exception, "exit_code", None) == 2
        assert words in str(result.exception)
