from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

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
    assert ranking["intervals"] == "sandwich"


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
