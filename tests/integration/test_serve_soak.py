"""A few seconds of the serving soak: nothing fails, no socket and no task is left, and what was measured is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_serving_soak.py"


def test_many_streams_leave_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    options = ["--minutes", "0.06", "--streams", "50", "--tokens-per-s", "40", "--out", str(out)]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["is_complete"]
    assert result["answers"]["streamed"] > 50
    assert min(result["answers"][kind] for kind in ("whole", "left")) > 0
    assert result["processes"]["gateway"]["most"]["sockets"] > 50


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    options = ["--minutes", "10", "--streams", "8", "--tokens-per-s", "200", "--write-every", "1", "--out", str(out)]
    soak = subprocess.Popen([sys.executable, str(_SCRIPT), *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline_s = time.monotonic() + 60
        while not out.exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        on_the_way = json.loads(out.read_text(encoding="utf-8"))
        soak.send_signal(signal.SIGINT)
        _, said = soak.communicate(timeout=60)
    finally:
        soak.kill()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert soak.returncode == 0, said
    assert not on_the_way["is_complete"]
    assert not result["is_complete"]
    assert 0 < on_the_way["answers"]["streamed"] <= result["answers"]["streamed"]
