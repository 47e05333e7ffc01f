"""`chaccu weights delta-make`, `delta-apply`, `average` and `extract`: what they print, and wrong use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from chaccu.cli import weights_delta
from chaccu.errors import UsageError, WeightsError
from chaccu.testing.tiny import build_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.weights.checkpoint import write_checkpoint  # noqa: E402 (torch may be absent)
from chaccu.weights.safetensors_file import TensorSpec  # noqa: E402

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def invoke(*arguments: str | Path) -> Result:
    app = typer.Typer()
    weights_delta.register(app)
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def build(folder: Path, *, step: float = 0.0, norm: float = 1.0) -> Path:
    tensors = {Q: torch.eye(8) + step * torch.ones(8, 8), NORM: torch.full((8,), norm)}
    folder.mkdir()
    write_checkpoint(folder, [TensorSpec(name, torch.float32, tuple(one.shape)) for name, one in tensors.items()], tensors.get)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    build_tokenizer(folder)
    return folder


def test_a_delta_is_made_and_applied(tmp_path: Path) -> None:
    base, target = build(tmp_path / "base"), build(tmp_path / "target", step=0.5)
    made = invoke("delta-make", "--base", base, "--target", target, "--out", tmp_path / "delta")
    assert made.stdout == f"{tmp_path / 'delta'}: 2 tensors, 1 of them unchanged, 0 whole; 0 of the base dropped\n"
    applied = invoke("delta-apply", "--base", base, "--delta", tmp_path / "delta", "--out", tmp_path / "back")
    assert applied.stdout == f"{tmp_path / 'back'}: 2 tensors, each with the SHA-256 that it had\n"
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()
    with pytest.raises(WeightsError, match="is not the base of"):
        invoke("delta-apply", "--base", target, "--delta", tmp_path / "delta", "--out", tmp_path / "again")


def test_a_folder_without_a_manifest_is_a_delta_of_floats(tmp_path: Path) -> None:
    base, delta = build(tmp_path / "base"), build(tmp_path / "delta", step=0.5)
    applied = invoke("delta-apply", "--base", base, "--delta", delta, "--out", tmp_path / "out")
    assert applied.stdout == f"{tmp_path / 'out'}: 2 tensors, all finite\n"
    assert "has no manifest.json: its floats were added" in applied.stderr


def test_an_average_says_the_shares(tmp_path: Path) -> None:
    folders = [build(tmp_path / "a"), build(tmp_path / "b", step=1.0)]
    result = invoke("average", *folders, "--weight", "3", "--weight", "1", "--out", tmp_path / "mean")
    assert result.stdout == f"{tmp_path / 'mean'}: the mean of 2 models (75.0%, 25.0%)\n"


def test_an_extract_prints_what_is_kept_and_what_is_lost(tmp_path: Path) -> None:
    base, tuned = build(tmp_path / "base"), build(tmp_path / "tuned", step=0.5, norm=3.0)
    options = ["--base", base, "--tuned", tuned, "--out", tmp_path / "adapter"]
    lines = invoke("extract", *options, "--rank", "1").stdout.splitlines()
    # 64 quarters of the layer's beside 8 fours of the norm's.
    assert [line.split() for line in lines[1:3]] == [["q_proj", "1", "33.33%", "100.0000%"], ["norms", "1", "66.67%", "none"]]
    assert lines[3].endswith("rank 1 keeps 100.0000% of the linear layers' change, 33.3333% of the whole")
    report = json.loads(invoke("extract", *options, "--energy", "0.9", "--json").stdout)
    assert (report["rank"], report["lost"][0]["tensors"]) == (1, [NORM])
    with pytest.raises(WeightsError, match=r"norms: model.norm.weight"):
        invoke("extract", *options, "--rank", "1", "--strict")
    for choice in ([], ["--rank", "1", "--energy", "0.5"]):
        with pytest.raises(UsageError, match="either --rank or --energy"):
            invoke("extract", *options, *choice)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no model at"):
        invoke("delta-make", "--base", tmp_path / "a/b/c", "--target", tmp_path, "--out", tmp_path / "delta")
