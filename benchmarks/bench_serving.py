"""What a gateway costs before an engine that costs almost nothing, and what a dying engine costs its clients: ours and others,
in one run on one machine.

The loads, the faults and the wrong requests are those of a harness that knows only URLs (`--harness`: its folder). Other
gateways are started from virtual environments of their own (`--environments DIR`, with `DIR/sglang-router`, `DIR/vllm-router`,
`DIR/litellm` and `DIR/fschat`). Writes `results/serving.json` and prints the table.

    python benchmarks/bench_serving.py --harness ../shared/bench/serving
    python benchmarks/bench_serving.py --harness H --environments E --gateways chaccu vllm-router --loads json-c32 sse-c32
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gateways import (
    Running,
    Stage,
    free_port,
    make_absolute,
    open_stage,
    start_chaccu,
    start_chaccu_workers,
    start_engine,
    start_fastchat,
    start_litellm,
    start_router,
    wait_for,
)
from machine import RESULTS, describe_machine

Start = Callable[[Stage, Sequence[int]], Running]

LOADS = ["json-c32", "sse-c32", "sse-c128", "slow-500", "slow-500-ramp"]
# How the engine's answers are told where it is not the harness's own: by events, without time stamps.
WORKER_LOADS = {
    "json-c32": ["--tokens", "16", "--concurrency", "32"],
    "sse-c32": ["--stream", "--tokens", "64", "--concurrency", "32"],
    "sse-c128": ["--stream", "--tokens", "64", "--concurrency", "128"],
}
FAULT_LOADS = {"json": ["--tokens", "16", "--think-ms", "100"], "streams": ["--stream", "--tokens", "64", "--gap-ms", "20"]}
KILL_S, REVIVE_S, FAULT_S = 4, 8, 14


def gateways(harness: Path) -> dict[str, Start]:
    """How each gateway is started."""
    return {
        "chaccu": start_chaccu,
        "chaccu-workers": start_chaccu_workers,
        "vllm-router": partial(start_router, environment="vllm-router", command=["vllm-router"]),
        "sglang-router": partial(
            start_router, environment="sglang-router", command=["sglang-router", "launch", "--policy", "round_robin"]
        ),
        "litellm": start_litellm,
        "fastchat": partial(start_fastchat, harness=harness),
    }


def run_harness(harness: Path, script: str, *arguments: str) -> str:
    """What a program of the harness prints."""
    command = [sys.executable, str(harness / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def measure_loads(stage: Stage, harness: Path, start: Start, options: argparse.Namespace) -> dict[str, Any]:
    """The standard loads, each paired with the same one directly on the engine."""
    port = free_port()
    engine = start_engine(stage, harness, port)
    running = start(stage, [port])
    out = stage.folder / "matrix.json"
    key = ["--api-key", running.api_key] if running.api_key else []
    run_harness(
        harness,
        "matrix.py",
        *("--base-url", running.url, "--direct-url", f"http://127.0.0.1:{port}/v1", *key),
        *("--server-pid", *map(str, running.pids), "--engine-pid", str(engine.pid)),
        *("--loads", *options.loads, "--runs", str(options.runs), "--duration", str(options.duration)),
        *("--quiet-wait", str(options.quiet_wait), "--out", str(out)),
    )
    found: dict[str, Any] = {}
    for load, row in json.loads(out.read_text())["loads"].items():
        found[load] = {name: row[name] for name in ("ratio", "ratio_range", "median", "direct") if name in row}
    return found


def measure_workers(stage: Stage, harness: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Loads on two dialled-in workers with the scripted engine: there is no way to them but through the gateway."""
    running = start_chaccu_workers(stage, [0, 0])
    found: dict[str, Any] = {}
    for load, arguments in WORKER_LOADS.items():
        texts = [
            run_harness(
                harness,
                "loadgen.py",
                *("--base-url", running.url, "--model", "fake", "--api-key", running.api_key or "", "--any-tokens"),
                *("--duration", str(options.duration), "--server-pid", *map(str, running.pids), *arguments),
            )
            for _ in range(options.runs)
        ]
        # The median run by what it is measured for.
        runs = sorted(map(json.loads, texts), key=lambda run: float(run["req_per_s"]))
        found[load] = runs[len(runs) // 2]
    return found


def measure_fault(stage: Stage, harness: Path, start: Start, arguments: Sequence[str], *, own_engines: bool) -> dict[str, Any]:
    """One of two engines is killed under load, and started again later on."""
    ports = [free_port(), free_port()]
    engines = [start_engine(stage, harness, port) for port in ports] if own_engines else []
    before = len(stage.processes)
    running = start(stage, ports)
    if not own_engines:
        # The last of what it has started: a worker, or an engine that speaks another protocol.
        engines = [one for one in stage.processes[before:] if one.pid not in running.pids]
    killed = engines[-1]
    revive = ["--revive-at", str(REVIVE_S), "--revive-cmd", " ".join(map(str, killed.args))] if own_engines else []  # type: ignore[arg-type]
    key = ["--api-key", running.api_key] if running.api_key else []
    report = json.loads(
        run_harness(
            harness,
            "faults.py",
            *("--base-url", running.url, "--model", "fake", *key, "--concurrency", "32", "--duration", str(FAULT_S)),
            *("--kill-at", str(KILL_S), "--kill-pid", str(killed.pid), *revive, *arguments),
        )
    )
    stage.processes.remove(killed)
    killed.wait()
    return {name: report[name] for name in ("ok", "failed", "errors", "before_kill_failed", "after_kill")}


def measure_revival(stage: Stage, harness: Path, start: Start) -> float | None:
    """Seconds from an engine's return until the gateway gives it a request again; None after half a minute."""
    ports = [free_port(), free_port()]
    engines = [start_engine(stage, harness, port) for port in ports]
    running = start(stage, ports)
    key = ["--api-key", running.api_key] if running.api_key else []
    load = [sys.executable, str(harness / "loadgen.py"), "--base-url", running.url, "--model", "fake", *key]
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            subprocess.run([*load, "--duration", "0.5", "--concurrency", "8", "--think-ms", "20"], capture_output=True)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        time.sleep(1)
        stage.processes.remove(engines[1])
        engines[1].kill()
        engines[1].wait()
        time.sleep(4)
        start_engine(stage, harness, ports[1])
        try:
            used = wait_for(
                stage, f"http://127.0.0.1:{ports[1]}/stats", until=lambda body: json.loads(body)["requests"] > 0, limit_s=30
            )
        except TimeoutError:
            return None
        return round(used, 2)
    finally:
        over.set()
        asking.join()


def measure_restart(stage: Stage, start: Start) -> float | None:
    """Seconds from `kill -9` of the gateway, started again at once, until its workers' model is served; None where it is not
    known how to start it again."""
    running = start(stage, [0, 0])
    if running.restart is None:
        return None
    begun = time.monotonic()
    running.restart()
    wait_for(stage, f"{running.url}/models", running.api_key, until=lambda body: b"fake" in body)
    return round(time.monotonic() - begun, 2)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that is asked for of one gateway."""
    start = gateways(options.harness)[name]
    found: dict[str, Any] = {}

    def on_stage(what: str, work: Callable[[Stage], Any]) -> None:
        if what not in options.parts:
            return
        print(f"{name}: {what}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, open_stage(Path(folder), options.environments) as stage:
            found.setdefault(what.partition("-")[0], {})[what] = work(stage)

    harness: Path = options.harness
    own_engines = name not in ("chaccu-workers", "fastchat")
    if name == "chaccu-workers":
        on_stage("loads", lambda stage: measure_workers(stage, harness, options))
        on_stage("restart", lambda stage: measure_restart(stage, start))
    else:
        on_stage("loads", lambda stage: measure_loads(stage, harness, start, options))
    for kind, arguments in FAULT_LOADS.items():
        more = [*arguments, "--any-tokens"] if name == "chaccu-workers" else arguments
        on_stage(
            f"faults-{kind}",
            lambda stage, more=more: measure_fault(stage, harness, start, more, own_engines=own_engines),  # type: ignore[misc]
        )
    if own_engines:
        on_stage("revival", lambda stage: measure_revival(stage, harness, start))
        on_stage("wrong", lambda stage: count_wrong(stage, harness, start))
    return found


def count_wrong(stage: Stage, harness: Path, start: Start) -> str:
    """What wrong requests get, as the harness tells it."""
    port = free_port()
    start_engine(stage, harness, port)
    running = start(stage, [port])
    key = ["--api-key", running.api_key] if running.api_key else []
    return run_harness(harness, "badinput.py", "--base-url", running.url, "--model", "fake", *key)


def print_table(results: dict[str, Any]) -> None:
    """The ratios and what matters beside them, a gateway a line."""
    for name, found in results.items():
        for load, row in found.get("loads", {}).get("loads", {}).items():
            middle = row.get("median", row)
            ratio = f"ratio {row['ratio']:.3f}" if "ratio" in row else "no direct way"
            values = (
                "req_per_s",
                "tok_per_s",
                "ttft_p99_ms",
                "transit_p99_ms",
                "server_cpu_s_per_1k",
                "server_rss_mb",
                "failed",
            )
            print(f"{name} {load}: {ratio}  " + "  ".join(f"{key} {middle.get(key)}" for key in values))
        for what, fault in found.get("faults", {}).items():
            print(
                f"{name} {what}: failed {fault['failed']} {fault['errors']}  last {fault['after_kill']['last_error_after_s']} s"
            )
        for what in ("revival", "restart"):
            if what in found:
                print(f"{name} {what}: {found[what][what]} s")


PARTS = ["loads", "faults-json", "faults-streams", "revival", "restart", "wrong"]


def main() -> None:
    """Measure, print and write."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--harness", type=Path, required=True)
    cli.add_argument("--environments", type=Path)
    cli.add_argument("--gateways", nargs="+", default=["chaccu", "chaccu-workers"], choices=list(gateways(Path())))
    cli.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    cli.add_argument("--loads", nargs="+", default=LOADS)
    cli.add_argument("--runs", type=int, default=3)
    cli.add_argument("--duration", type=float, default=4, help="seconds of a run")
    cli.add_argument("--quiet-wait", type=float, default=30, help="seconds to wait for other work on the machine to end")
    cli.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    options = cli.parse_args()
    make_absolute(options)
    results: dict[str, Any] = {}
    for name in options.gateways:
        results[name] = measure(name, options)
        written = {"machine": describe_machine("starlette", "uvicorn", "uvloop", "aiohttp", "msgspec"), "gateways": results}
        options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print_table(results)


if __name__ == "__main__":
    main()
