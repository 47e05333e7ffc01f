"""How long the command line takes to answer, and the gateway to listen; how much memory an idle gateway holds.

Writes `results/startup.json`. Limits: `chaccu --help` in less than 0.3 s.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import RESULTS, describe_machine

from chaccu.testing.processes import start_gateway

RUNS = 7


def measure_help_s() -> list[float]:
    """Wall seconds of `chaccu --help`, sorted."""
    took = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "chaccu.cli.main", "--help"], check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - begun)
    return sorted(took)


def measure_gateway() -> tuple[list[float], int]:
    """Wall seconds until the gateway listens, sorted, and the resident bytes of the last one."""
    took, resident = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(RUNS):
            begun = time.perf_counter()
            with start_gateway(Path(folder)) as gateway:
                took.append(time.perf_counter() - begun)
                status = Path(f"/proc/{gateway.pid}/status").read_text(encoding="utf-8")
                resident = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
    return sorted(took), resident


def main() -> None:
    """Measure, print and write."""
    help_s, (gateway_s, gateway_bytes) = measure_help_s(), measure_gateway()
    result = {
        "machine": describe_machine("typer", "starlette", "uvicorn"),
        "help_s": {"median": statistics.median(help_s), "best": help_s[0], "limit": 0.3},
        "gateway_ready_s": {"median": statistics.median(gateway_s), "best": gateway_s[0]},
        "gateway_resident_bytes": gateway_bytes,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "startup.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
