from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from chaccu.cli import doctor, machine


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    doctor.register(app)
    return app


def invoke(app: typer.Typer, *arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_json_holds_the_machine(app: typer.Typer) -> None:
    found = json.loads(invoke(app, "--json"))
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cores"] >= 1
    assert found["disk_free_bytes"] > 0
    assert found["memory_bytes"] > found["memory_free_bytes"] > 0
    for ability in found["abilities"]:
        assert ability["ready"] == all(part["found"] for part in ability["parts"]), ability
        assert ability["ready"] != bool(ability["remedy"]), ability


def test_without_torch_it_names_the_commands_that_add_it(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: None if name == "torch" else real(name))
    monkeypatch.setattr(machine.util, "find_spec", lambda name: None)
    said = invoke(app)
    assert "no   fine-tune" in said
    assert "missing: torch" in said
    assert "pip install 'chaccu[train]'" in said
    assert json.loads(invoke(app, "--json"))["torch"] is None


def test_gpus_are_listed_and_a_torch_without_cuda_is_named(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, 'echo "NVIDIA H100, 81559, 80000"; echo "NVIDIA H100, 81559, 70000"')
    monkeypatch.setattr(machine, "_version", lambda name: "1.0")
    monkeypatch.setattr(machine, "_torch_cuda", lambda: None)
    said = invoke(app)
    assert said.count("NVIDIA H100, 85.5 GB") == 2
    assert "built without CUDA" in said
    monkeypatch.setattr(machine, "_torch_cuda", lambda: "13.0")
    assert "on 2 GPUs" in invoke(app)


def test_a_broken_driver_is_named(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, "exit 9")
    assert "nvidia-smi does not answer" in invoke(app)


@pytest.mark.parametrize(("line", "cuda"), [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", None)])
def test_the_cuda_version_is_read_without_importing_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, cuda: str | None
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13'\n{line}\n")
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})()
    monkeypatch.setattr(machine.util, "find_spec", lambda name: spec)
    assert machine._torch_cuda() == cuda


def test_it_is_quick_and_loads_no_library() -> None:
    code = (
        "import sys; from chaccu.cli.machine import survey_machine; survey_machine();"
        "print([name for name in ('torch', 'gradio', 'polars', 'transformers') if name in sys.modules])"
    )
    began_s = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert time.perf_counter() - began_s < 5
