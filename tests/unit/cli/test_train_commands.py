"""`chaccu train`: what is wrong for all processes of a run is told once, before they start; what its end says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from chaccu.cli.train import register
from chaccu.errors import ChaccuError
from chaccu.train.recipe import Recipe
from chaccu.train.report import TrainReport

pytest.importorskip("torch", reason="torch is not installed")

APP = typer.Typer()
register(APP)


@APP.callback()
def _group() -> None:
    """So that the command keeps its name."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "train.jsonl").write_text("{}\n")
    values = {
        "model": str(tmp_path / "base"),
        "data": [{"path": str(tmp_path / "train.jsonl")}],
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "processes": 8}))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [("data=[{path: absent.jsonl}]", "absent.jsonl"), ("model=./absent", "absent"), ("output=BASE", "folder of the model")],
)
def test_a_run_of_eight_processes_that_cannot_begin_starts_none(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    def launch(*_: object) -> None:
        raise AssertionError("processes were started")

    monkeypatch.setattr("chaccu.train.launch.launch", launch)
    arguments = ["train", str(recipe), override.replace("BASE", str(recipe.parent / "base"))]
    result = CliRunner().invoke(APP, arguments)
    assert isinstance(result.exception, ChaccuError)
    assert message in result.exception.message


def test_the_end_says_what_was_trained_and_what_was_left_out(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(_: Recipe, **__: Any) -> TrainReport:
        return TrainReport(
            output="runs/out",
            steps=12,
            loss_before=2.0,
            loss_after=1.5,
            tokens=3000,
            trained_tokens=1000,
            seconds=4.2,
            fill=0.95,
            token_rows=[],
            log=[],
            left_out={"train.jsonl": 1200},
        )

    monkeypatch.setattr("chaccu.train.run.train", train)
    result = CliRunner().invoke(APP, ["train", str(recipe), "processes=1"])
    assert result.exit_code == 0
    assert "held-out loss 2.0000 -> 1.5000 nats a token" in result.output
    assert "1,200 conversations of train.jsonl were left out: they have more than its max_tokens" in result.output
    assert "12 steps, 3,000 tokens (1,000 trained), rows 95.0% full, 4 s -> runs/out" in result.output
