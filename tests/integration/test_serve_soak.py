"""A few seconds of the serving soak: nothing fails, nothing is wrong, no socket and no task is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_serving_soak.py"


def test_many_streams_leave_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    options = ["--minutes", "0.06", "--streams", "50", "--tokens-per-s", "40", "--out", str(out)]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["answers"]["streamed"] > 50
    assert min(result["answers"][kind] for kind in ("whole", "left")) > 0
    assert result["processes"]["gateway"]["most"]["sockets"] > 50
