"""A delta's making that is ended in the middle: nothing half-written stays, and the same command does it all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.weights.checkpoint import write_checkpoint  # noqa: E402 (torch may be absent)
from chaccu.weights.safetensors_file import TensorSpec  # noqa: E402

# The command, which says when it has written a tensor, and then takes its time.
_SLOW = """
import os, sys, time
from pathlib import Path
from chaccu.cli.main import main
from chaccu.weights.safetensors_file import SafetensorsWriter
write = SafetensorsWriter.write
def write_slowly(self, tensor):
    write(self, tensor)
    Path(os.environ["WRITTEN"]).touch()
    time.sleep(60)
SafetensorsWriter.write = write_slowly
main()
"""
_STARTED_S = 60


def build(folder: Path, value: float) -> Path:
    folder.mkdir()
    specs = [TensorSpec(name, torch.float32, (64, 64)) for name in ("a", "b")]
    write_checkpoint(folder, specs, lambda _: torch.full((64, 64), value))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_an_ended_command_leaves_no_folder_and_runs_again(
    tmp_path: Path, number: signal.Signals, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, target, out = build(tmp_path / "base", 1.0), build(tmp_path / "target", 2.0), tmp_path / "delta"
    written = tmp_path / "written"
    monkeypatch.setenv("WRITTEN", str(written))
    arguments = ["weights", "delta-make", "--base", str(base), "--target", str(target), "--out", str(out)]
    with subprocess.Popen([sys.executable, "-c", _SLOW, *arguments], stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + _STARTED_S
        while not written.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        assert not out.exists()
        process.send_signal(number)
        _, said = process.communicate(timeout=_STARTED_S)
    assert process.returncode == exit_code, said
    if number == signal.SIGINT:
        assert not list(tmp_path.glob(".*"))
    assert not out.exists()
    subprocess.run([sys.executable, "-m", "chaccu.cli.main", *arguments], check=True, capture_output=True)
    assert (out / "manifest.json").is_file()
    # What the killed one left is gone too.
    assert not list(tmp_path.glob(".*"))
