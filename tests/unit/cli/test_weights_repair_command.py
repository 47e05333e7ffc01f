"""`chaccu weights repair`: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chaccu.cli.main import app
from chaccu.errors import UsageError, WeightsError

pytest.importorskip("torch", reason="torch is not installed")

from chaccu.testing.tiny import build_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = build_llama(tmp_path / "model")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LLaMAForCausalLM"], "pad_token_id": -1}))
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["weights", "repair", *map(str, arguments)])


@pytest.mark.parametrize("options", [(), ("--check",)])
def test_by_itself_it_shows_the_changes_and_makes_none(folder: Path, options: tuple[str, ...]) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    shown = run(folder, *options)
    assert shown.exit_code == 1
    assert '-    "LLaMAForCausalLM"' in shown.stdout
    assert '+    "LlamaForCausalLM"' in shown.stdout
    assert "2 faults = 2 that --write mends + 0 that it does not" in shown.stdout
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_written_it_ends_well_and_is_sound(folder: Path) -> None:
    written = run(folder, "--write")
    assert written.exit_code == 0
    assert "2 faults found, 0 left" in written.stdout
    assert (folder / "config.json.orig").is_file()
    again = run(folder)
    assert (again.exit_code, again.stdout.splitlines()[-1]) == (0, f"{folder} is sound")


def test_as_json_a_program_reads_it(folder: Path) -> None:
    found = json.loads(run(folder, "--json").stdout)
    assert [finding["fault"] for finding in found["findings"]] == ["class-names", "special-ids"]
    assert found["left"] == found["findings"]
    out = folder.parent / "out"
    copied = run(folder, "--out", out, "--json", "--format", "chatml")
    assert copied.exit_code == 0
    found = json.loads(copied.stdout)
    assert (found["out"], found["left"], len(found["findings"])) == (str(out), [], 3)
    assert json.loads((out / "manifest.json").read_text())["chat_format"] == "chatml"


def test_what_it_cannot_mend_makes_it_end_with_one(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    ended = run(folder, "--write", "--no-backup")
    assert ended.exit_code == 1
    assert "3 faults found, 1 left" in ended.stdout
    assert not list(folder.glob("*.orig"))


def test_wrong_use_is_told(folder: Path, tmp_path: Path) -> None:
    for options in (("--check", "--write"), ("--write", "--out", tmp_path / "o"), ("--write", "--grow-embeddings")):
        assert isinstance(run(folder, *options).exception, UsageError)
    assert isinstance(run(tmp_path / "none" / "such", "--write").exception, UsageError)
    assert isinstance(run(tmp_path / "none" / "such").exception, WeightsError)
