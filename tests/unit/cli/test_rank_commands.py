from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from chaccu.artifact import Manifest, write_manifest
from chaccu.cli import rank
from chaccu.errors import DataError, UsageError
from chaccu.judge.verdicts import Verdict


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    rank.register(app)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def write(folder: Path, *rows: str) -> str:
    file = folder / "battles.csv"
    file.write_text("\n".join(("model_a,model_b,winner", *rows)) + "\n")
    return str(file)


def test_it_prints_a_table_and_writes_the_same_as_json(tmp_path: Path) -> None:
    file = write(tmp_path, *["a,b,model_a"] * 30, *["a,b,model_b"] * 10, "b,a,tie")
    result = invoke(file, "--out", str(tmp_path / "r.json"), "--bootstraps", "50")
    assert result.exit_code == 0
    assert "41 battles = 40 decided + 1 ties, 2 models" in result.stdout
    assert result.stderr == ""
    ranking = json.loads((tmp_path / "r.json").read_text())
    assert [row["model"] for row in ranking["ratings"]] == ["a", "b"]
    assert ranking["components"] == [["a", "b"]]
    assert json.loads(invoke(file, "--json", "--bootstraps", "50").stdout) == ranking


def test_unconnected_models_are_warned_about(tmp_path: Path) -> None:
    result = invoke(write(tmp_path, "a,b,tie", "c,d,model_a"), "--bootstraps", "5")
    assert "2 components that never met" in result.stderr
    assert "no finite value" in result.stderr
    assert "component 2, tier 2" in result.stdout


def test_a_bad_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"battle 2 .* has the winner 'x'"):
        invoke(write(tmp_path, "a,b,tie", "a,b,x"))


def test_several_files_give_several_forms_of_one_ranking(tmp_path: Path) -> None:
    first = write(tmp_path, *["a,b,model_a"] * 3, "a,b,model_b", "b,c,")
    second = tmp_path / "more.jsonl"
    second.write_text('{"model_a": "b", "model_b": "c", "winner": "tie", "length_a": 1, "length_b": 2}\n' * 2)
    outs = [tmp_path / f"r{end}" for end in (".json", ".csv", ".md", ".html")]
    options = [word for out in outs for word in ("--out", str(out))]
    result = invoke(first, str(second), "--intervals", "sandwich", "--ties", "rao-kupper", "--pairs", *options)
    assert all(out.stat().st_size for out in outs)
    assert "6 battles = 4 decided + 2 ties, 3 models" in result.stdout
    assert "95 % intervals from sandwich errors by battles" in result.stdout
    assert "ties: Rao and Kupper's model" in result.stdout
    assert "warning: 1 rows without a winner" in result.stderr
    assert len(json.loads(outs[0].read_text())["pairs"]) == 3


def test_another_form_is_refused_before_the_battles_are_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"r\.xls"):
        invoke(str(tmp_path / "none.csv"), "--out", str(tmp_path / "r.xls"))


def test_names_cannot_steer_the_terminal_or_break_the_table(tmp_path: Path) -> None:
    file = tmp_path / "b.csv"
    file.write_text('model_a,model_b,winner\n"a\x1b[2J\nz",b,tie\n"a\x1b[2J\nz",b,tie\n')
    result = invoke(str(file), "--bootstraps", "5")
    assert "\x1b" not in result.output
    assert "a [2J z" in result.stdout


def test_files_of_which_some_have_no_questions_are_warned_about(tmp_path: Path) -> None:
    first = write(tmp_path, "a,b,tie", "a,b,model_a", "b,a,model_a")
    second = tmp_path / "more.csv"
    second.write_text("model_a,model_b,winner,question_id\na,b,tie,1\n")
    both = invoke(first, str(second), "--bootstraps", "5")
    assert f"warning: {first} without question_id: battles are taken as independent" in both.stderr
    assert "resamples of battles" in both.stdout
    assert "without question_id" not in invoke(first, "--bootstraps", "5").stderr
    assert "without question_id" not in invoke(first, str(second), "--by-battle", "--bootstraps", "5").stderr


def test_few_questions_are_warned_about(tmp_path: Path) -> None:
    file = tmp_path / "b.csv"
    rows = [f"a,b,{('model_a', 'model_b')[question % 2]},{question}" for question in range(20)]
    file.write_text("\n".join(("model_a,model_b,winner,question_id", *rows)) + "\n")
    assert invoke(str(file), "--bootstraps", "5").stderr == ""
    file.write_text("\n".join(("model_a,model_b,winner,question_id", *rows[:19])) + "\n")
    assert "warning: the battles are on 19 questions; with fewer than 20 intervals say little" in invoke(str(file)).stderr


def test_style_is_taken_out_where_rows_tell_it(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        winner = "model_a" if number % 3 else "model_b"
        texts = ("long " * (3 + number % 5), "short " * (1 + number % 2))
        rows.append({"model_a": "a", "model_b": "b", "winner": winner, "answer_a": texts[0], "answer_b": texts[1]})
    file = tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranking = json.loads(invoke(str(file), "--style", "--json").stdout)
    effects = {effect["style"]: effect["effect"] for effect in ranking["style"]}
    assert list(effects) == ["length", "headers", "lists", "bold"]
    assert [effects["headers"], effects["lists"], effects["bold"]] == [None, None, None]
    assert effects["length"] is not None
    assert (ranking["intervals"], ranking["bootstraps"]) == ("sandwich", 0)
    asked = json.loads(invoke(str(file), "--style", "--intervals", "bootstrap", "--bootstraps", "30", "--json").stdout)
    assert (asked["intervals"], asked["bootstraps"]) == ("bootstrap", 30)


def test_a_judging_folder_is_ranked_by_its_pairs(tmp_path: Path) -> None:
    def verdict(question: int, models: tuple[str, str], outcome: str | None) -> Verdict:
        said = {"judge": "j", "prompt": "p", "prompt_sha256": "0", "text": ""}
        return Verdict(key="0", question_id=question, category="", turn=None, models=models, outcome=outcome, **said)  # type: ignore[arg-type]

    verdicts = [
        verdict(1, ("a", "b"), "first"),
        verdict(1, ("b", "a"), "second"),
        verdict(2, ("a", "b"), "first"),
        verdict(2, ("b", "a"), "first"),
        verdict(3, ("a", "b"), None),
    ]
    (tmp_path / "verdicts.jsonl").write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in verdicts))
    ranking = json.loads(invoke(str(tmp_path), "--json", "--bootstraps", "9").stdout)
    assert (ranking["battles"], ranking["ties"], ranking["unread"], ranking["questions"]) == (2, 1, 1, 2)
    assert [(row["model"], row["wins"]) for row in ranking["ratings"]] == [("a", 1), ("b", 0)]


def test_a_comparison_of_which_an_order_failed_is_no_battle(tmp_path: Path) -> None:
    def task(first: str, second: str, question: int, **fields: Any) -> dict[str, Any]:
        named = {"question_id": question, "category": "", "turn": None, "models": [first, second]}
        return {**named, "judge": "j", "prompt": "p", "key": f"{first}{question}", **fields}

    said = {"prompt_sha256": "0", "text": ""}
    verdicts = [
        task("a", "b", 1, outcome="first", **said),
        task("b", "a", 1, outcome="second", **said),
        task("a", "b", 2, outcome="first", **said),
    ]
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in verdicts))
    failure = task("b", "a", 2, cause="time-out", message="it was silent")
    (tmp_path / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    write_manifest(tmp_path, Manifest(kind="verdicts", name="run", facts={"asked": 6}))
    result = invoke(str(tmp_path), "--json")
    ranking = json.loads(result.stdout)
    assert (ranking["battles"], ranking["unread"]) == (1, 1)
    assert "warning: 2 verdicts that a manifest speaks of are not in the files" in result.stderr
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "verdicts.jsonl").write_bytes((tmp_path / "verdicts.jsonl").read_bytes())
    both = invoke(str(tmp_path), str(copy), write(tmp_path, "a,b,tie"), "--json", "--by-battle")
    assert (json.loads(both.stdout)["battles"], json.loads(both.stdout)["ties"]) == (2, 1)
    assert "3 verdicts are there twice, and count once" in both.stderr
    assert "replace them" not in both.stderr
    (copy / "verdicts.jsonl").write_text(json.dumps(verdicts[0] | {"key": "of another question"}) + "\n")
    mixed = invoke(str(tmp_path), str(copy), "--json")
    assert "1 verdicts have the ids of earlier ones, were asked otherwise and replace them" in mixed.stderr
    assert "are there twice" not in mixed.stderr


def test_battles_are_not_replaced_by_their_ranking(tmp_path: Path) -> None:
    file = write(tmp_path, "a,b,tie")
    (tmp_path / "link.csv").symlink_to(file)
    before = Path(file).read_text()
    for out in (file, str(tmp_path / "link.csv")):
        with pytest.raises(UsageError, match="is read, and would be replaced"):
            invoke(file, "--out", out)
    assert Path(file).read_text() == before


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "a,b,tie")
    with pytest.raises(UsageError, match="is named twice"):
        invoke(file, str(tmp_path / "." / "battles.csv"))
