"""Two processes report what one does: one log, the same losses and answers, snapshots that are whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from chaccu.artifact import read_manifest, verify_files
from chaccu.conversation import Conversation, Message

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from two_processes import run_two

from chaccu.testing.tiny import build_model
from chaccu.train.recipe import Recipe
from chaccu.train.report import EvalReport, Record, StartReport, StepReport, read_log
from chaccu.train.run import train


def build_recipe(folder: Path, **fields: Any) -> Recipe:
    talk = [
        Conversation(
            messages=(Message("user", f"What colour is the {thing}?"), Message("assistant", f"The {thing} is {colour}."))
        )
        for thing in ("sky", "grass", "sea", "snow", "egg")
        for colour in ("red", "green", "blue")
    ]
    for name, part in (("train", talk[:-4]), ("held-out", talk[-4:])):
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, part)))
    values = {
        "model": str(build_model(folder / "base", "llama")),
        "data": [{"path": str(folder / "train.jsonl")}],
        "validation": [{"path": str(folder / "held-out.jsonl")}],
        "sequence_len": 64,
        "sample_tokens": 12,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "num_train_epochs": 9,
        "precision": "fp32",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 1,
    }
    return msgspec.convert({**values, **fields}, Recipe)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_report_and_save_what_one_does(tmp_path: Path, method: str) -> None:
    two = build_recipe(tmp_path, method=method, output=str(tmp_path / "two"), processes=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(two)))
    run_two([sys.executable, "-m", "chaccu.cli.main", "train", str(tmp_path / "recipe.yaml")])
    one = msgspec.structs.replace(two, output=str(tmp_path / "one"), processes=1, gradient_accumulation_steps=2)
    told: list[Record] = []
    result = train(one, report=told.append)
    evals = [record for record in told if isinstance(record, EvalReport)]
    records = read_log(tmp_path / "two" / "logs" / "train_log.jsonl")
    start = told[0]
    assert isinstance(start, StartReport)
    assert records[0] == msgspec.structs.replace(start, processes=2)
    steps = [record for record in records if isinstance(record, StepReport)]
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in result.log], rel=1e-3)
    shown = [record for record in records if isinstance(record, EvalReport)]
    assert [(report.step, report.samples) for report in shown] == [(report.step, report.samples) for report in evals]
    assert [report.loss for report in shown] == pytest.approx([report.loss for report in evals], rel=1e-3)
    (snapshot,) = (tmp_path / "two.snapshots").iterdir()
    manifest = read_manifest(snapshot, kind="model" if method == "full" else "adapter")
    verify_files(snapshot, manifest.files)
    assert manifest.facts["held_out_loss"] == shown[-1].loss
    assert manifest.files.keys() == {name for name in read_manifest(tmp_path / "two").files if not name.startswith("logs/")}
    assert not (tmp_path / "two.run").exists()
