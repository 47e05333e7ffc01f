from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from chaccu.cli import rank
from chaccu.errors import DataError


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
