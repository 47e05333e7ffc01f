"""Running a command and measuring it: CPU seconds of the whole process tree, and the peak of its memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Measured:
    """`cpu_s`: user and system, of the command and all its children; `peak_bytes`: the largest sum of their proportional set
    sizes, sampled; `output`: what it wrote."""

    cpu_s: float
    wall_s: float
    peak_bytes: int
    exit_code: int
    output: str

    def __add__(self, other: Measured) -> Measured:
        """Two commands one after the other."""
        return Measured(
            self.cpu_s + other.cpu_s,
            self.wall_s + other.wall_s,
            max(self.peak_bytes, other.peak_bytes),
            self.exit_code or other.exit_code,
            self.output + other.output,
        )


def run_measured(command: Sequence[str], *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> Measured:
    """Run a command to its end. Raises `RuntimeError` with its output when it fails."""
    begun, before = time.monotonic(), os.times()
    process = subprocess.Popen(
        [*command],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = _Peak(process.pid)
    output, _ = process.communicate()
    peak.stop()
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-3000:]}")
    return Measured(cpu_s, time.monotonic() - begun, peak.bytes, process.returncode, output)


class _Peak:
    """Samples a process tree's memory until `stop`."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self.bytes = max(self.bytes, sum(map(_pss_bytes, _tree_of(self._pid))))


def _tree_of(pid: int) -> list[int]:
    children_of: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):  # it has just ended
                continue
            children_of.setdefault(parent, []).append(int(entry.name))
    tree = [pid]
    for member in tree:
        tree.extend(children_of.get(member, []))
    return tree


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
