"""Commands for a limited time, and the lines that other trainers' benches end with."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


def test_a_command_says_how_it_ended_and_what_it_wrote(limited: ModuleType, tmp_path: Path) -> None:
    script = "import os, sys; print(os.getcwd()); print('bad', file=sys.stderr); sys.exit(3)"
    ended = limited.run_limited([sys.executable, "-c", script], limit_s=30, folder=tmp_path)
    assert ended.exit_code == 3
    assert ended.output.splitlines() == [str(tmp_path), "bad"] or ended.output.splitlines() == ["bad", str(tmp_path)]
    assert "/" not in "".join(ended.last_lines)


def test_at_the_limit_a_command_ends_with_its_children(limited: ModuleType) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    ended = limited.run_limited([sys.executable, "-c", script], limit_s=2)
    assert ended.exit_code is None
    assert 2 <= ended.wall_s < 20
    assert is_gone(int(ended.output))


def test_a_child_that_is_left_over_does_not_hold_up_the_result(limited: ModuleType) -> None:
    script = "import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    ended = limited.run_limited([sys.executable, "-c", script], limit_s=30)
    assert ended.exit_code == 0
    assert ended.wall_s < 20
    assert is_gone(int(ended.output))


def is_gone(pid: int) -> bool:
    """Whether a process ends within some seconds; one that nobody has asked for its exit code yet has ended."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_command_that_is_not_there_did_not_start(limited: ModuleType) -> None:
    ended = limited.run_limited(["no-such-command-of-any-name"], limit_s=5)
    assert ended.exit_code is None
    assert "cannot be started" in ended.output


@pytest.mark.parametrize(
    ("line", "name", "rate", "mfu", "peak_gb"),
    [
        (
            "RESULT hf-trainer shape=1b batch=2x8 liger=False optim=adamw_torch_fused: 9,411 useful tok/s/GPU, MFU 0.064, "
            "peak 47.5 GiB, world 1",
            "hf-trainer shape=1b batch=2x8 liger=False optim=adamw_torch_fused",
            9411,
            0.064,
            51.0,
        ),
        ("RESULT other 1b bfd: fill 0.945, 30250 useful tok/s, MFU 0.204, peak 61.2 GiB", "other 1b bfd", 30250, 0.204, 65.7),
        ("RESULT third: 12.5 tokens/s, MFU 0.1, peak 8 GB", "third", 12.5, 0.1, 8.0),
    ],
)
def test_result_lines_are_read(limited: ModuleType, line: str, name: str, rate: float, mfu: float, peak_gb: float) -> None:
    assert limited.parse_rival(f"loading\n{line}\n") == limited.RivalResult(name, rate, mfu, peak_gb)


def test_of_several_result_lines_the_last_counts(limited: ModuleType) -> None:
    lines = [f"RESULT a: {rate} useful tok/s, MFU 0.1, peak 1.0 GB" for rate in (1, 2)]
    assert limited.parse_rival("\n".join(lines)).useful_tokens_per_s == 2


@pytest.mark.parametrize(
    "output",
    [
        "",
        "RESULT a: nan useful tok/s, MFU nan, peak 1.0 GiB",
        "RESULT a: 5 useful tok/s\nMFU 0.1, peak 1.0 GiB",
        "no RESULT a: 1",
    ],
)
def test_what_lacks_a_figure_is_no_result(limited: ModuleType, output: str) -> None:
    assert limited.parse_rival(output) is None


def test_folders_are_hidden_and_units_and_links_are_not(limited: ModuleType) -> None:
    text = 'File "/home/someone/there/model.py", line 5: 3 tok/s, 5 / 3, src/model.py, https://example.org/a/b, ~/x/y.npz'
    assert limited.hide_folders(text) == (
        'File "model.py", line 5: 3 tok/s, 5 / 3, src/model.py, https://example.org/a/b, y.npz'
    )
