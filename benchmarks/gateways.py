"""Gateways that the serving bench starts in front of engines on this machine: ours, and others from their own environments."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MODEL = "fake"
_READY_S = 90


@dataclass
class Running:
    """A gateway that answers. `url`: up to and with /v1. `pids`: its processes, without those of their children."""

    url: str
    pids: list[int]
    api_key: str | None = None
    restart: Callable[[], None] | None = None


@dataclass
class Stage:
    """Where processes are started: their logs, what ends with the block, and the folder of the others' environments."""

    folder: Path
    environments: Path | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _logs: dict[int, Path] = field(default_factory=dict)
    _started: int = 0

    def start(self, command: Sequence[str], name: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command; its output goes to a log in the folder."""
        self._started += 1
        path = self.folder / f"{name}-{self._started}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [*command],
                stdout=log,
                stderr=subprocess.STDOUT,
                # Some write logs of their own where they are started.
                cwd=self.folder,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.processes.append(process)
        self._logs[process.pid] = path
        return process

    def tool(self, environment: str, name: str) -> str:
        """A program of another gateway's environment. Raises `SystemExit` where that is not made."""
        if self.environments is None or not (path := self.environments / environment / "bin" / name).is_file():
            raise SystemExit(
                f"{name} is not in {self.environments}/{environment}: make a virtual environment of that name with it"
            )
        return str(path)

    def check(self) -> None:
        """Raise `RuntimeError` with the last words of a process that has ended by itself."""
        for process in self.processes:
            if process.poll() is not None:
                log = self._logs[process.pid]
                raise RuntimeError(f"{log.stem} ended with {process.returncode}:\n{log.read_text(errors='replace')[-2000:]}")

    def end(self, process: subprocess.Popen[bytes], sent: signal.Signals = signal.SIGTERM) -> None:
        """End a process and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def open_stage(folder: Path, environments: Path | None) -> Iterator[Stage]:
    """A stage whose processes end with the block, also when this process is told to end."""
    stage = Stage(folder, environments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield stage
    finally:
        for process in reversed(stage.processes):
            stage.end(process)


def make_absolute(options: argparse.Namespace) -> None:
    """Let paths hold wherever a process is started, those that Python looks for packages in too."""
    if path := os.environ.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(part).absolute()) for part in path.split(os.pathsep))
    for name, value in vars(options).items():
        if isinstance(value, Path):
            setattr(options, name, value.absolute())


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(
    stage: Stage,
    url: str,
    key: str | None = None,
    *,
    until: Callable[[bytes], bool] = bool,
    limit_s: float = _READY_S,
) -> float:
    """Seconds until `url` answers with 200 and a body that will do. Raises `TimeoutError`, or `RuntimeError` where what was
    started has ended."""
    begun = time.monotonic()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    while time.monotonic() < begun + limit_s:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as reply:
            if until(reply.read()):
                return time.monotonic() - begun
        stage.check()
        time.sleep(0.02)
    raise TimeoutError(f"{url} did not answer within {limit_s} s")


def start_engine(stage: Stage, harness: Path, port: int, *arguments: str) -> subprocess.Popen[bytes]:
    """The harness's engine."""
    command = [sys.executable, str(harness / "fake_engine.py"), "--port", str(port), "--model", MODEL, *arguments]
    process = stage.start(command, "engine")
    wait_for(stage, f"http://127.0.0.1:{port}/v1/models")
    return process


def start_chaccu(stage: Stage, engines: Sequence[int]) -> Running:
    """Ours before plain upstreams: API keys, validation, metrics and continuation are on."""
    upstreams = [part for port in engines for part in ("--upstream", f"{MODEL}=http://127.0.0.1:{port}/v1")]
    return start_ours(stage, upstreams)


def start_chaccu_workers(stage: Stage, engines: Sequence[int]) -> Running:
    """Ours with as many workers dialled in, each with the scripted engine; the harness's engines are not used."""
    # Before the gateway: one that runs knows of a new key a second or two later.
    keys = [
        create_key(stage.folder / "keys.json", "--name", f"w{number}", "--scope", "worker", "--model", MODEL)
        for number, _ in enumerate(engines)
    ]
    running = start_ours(stage, [])
    for key in keys:
        command = ["worker", "--model", f"scripted:{MODEL}", "--gateway", running.url.removesuffix("/v1"), "--slots", "256"]
        stage.start([*OURS, *command], "worker", CHACCU_JOIN_TOKEN=key)
    wait_for(stage, f"{running.url}/models", running.api_key, until=lambda body: MODEL.encode() in body)
    return running


OURS = [sys.executable, "-m", "chaccu.cli.main"]


def create_key(keys: Path, *arguments: str) -> str:
    """A new API key in the file `keys`."""
    made = subprocess.run(
        [*OURS, "keys", "create", "--keys", str(keys), *arguments], check=True, capture_output=True, text=True
    )
    return next(word for word in made.stdout.split() if word.startswith("sk-chaccu-"))


def start_ours(stage: Stage, arguments: Sequence[str]) -> Running:
    """A gateway of ours with an API key, and more `arguments`."""
    keys, port = stage.folder / "keys.json", free_port()
    key = create_key(keys, "--name", "bench", "--scope", "chat", "--scope", "metrics")
    command = [*OURS, "gateway", "--port", str(port), "--keys", str(keys), *arguments]
    running = Running(f"http://127.0.0.1:{port}/v1", [], key)

    def start() -> None:
        process = stage.start(command, "chaccu")
        running.pids[:] = [process.pid]
        wait_for(stage, f"http://127.0.0.1:{port}/health")

    def restart() -> None:
        former = next(one for one in stage.processes if one.pid == running.pids[0])
        stage.end(former, signal.SIGKILL)
        stage.processes.remove(former)
        start()

    running.restart = restart
    start()
    return running


def start_router(stage: Stage, engines: Sequence[int], *, environment: str, command: Sequence[str]) -> Running:
    """SGLang's or vLLM's router."""
    port = free_port()
    urls = [f"http://127.0.0.1:{engine}" for engine in engines]
    options = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--worker-urls", *urls]
    process = stage.start([stage.tool(environment, command[0]), *command[1:], *options], environment)
    wait_for(stage, f"http://127.0.0.1:{port}/v1/models")
    return Running(f"http://127.0.0.1:{port}/v1", [process.pid])


def start_litellm(stage: Stage, engines: Sequence[int]) -> Running:
    """LiteLLM's proxy; it does not start without a key of some length."""
    key = f"sk-{secrets.token_hex(32)}"
    port, config = free_port(), stage.folder / "litellm.yaml"
    model = {"model": f"openai/{MODEL}", "api_key": "none"}
    entries = [
        {"model_name": MODEL, "litellm_params": {**model, "api_base": f"http://127.0.0.1:{engine}/v1"}} for engine in engines
    ]
    config.write_text(json.dumps({"model_list": entries, "router_settings": {"num_retries": 2}}))
    command = [stage.tool("litellm", "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LITELLM_MASTER_KEY": key}
    process = stage.start(command, "litellm", **environment)
    wait_for(stage, f"http://127.0.0.1:{port}/health/liveliness")
    return Running(f"http://127.0.0.1:{port}/v1", [process.pid], key)


def start_fastchat(stage: Stage, engines: Sequence[int], *, harness: Path) -> Running:
    """FastChat's controller and API server; the engines speak its worker protocol, on ports of their own. Its streams need
    pydantic<2 in its environment, and fastapi<0.112 beside it."""
    controller, port = free_port(), free_port()
    python = stage.tool("fschat", "python")
    at = ["--host", "127.0.0.1", "--port"]
    first = stage.start([python, "-m", "fastchat.serve.controller", *at, str(controller)], "fastchat-controller")
    wait_for(stage, f"http://127.0.0.1:{controller}/test_connection")
    for _ in engines:
        start_engine(stage, harness, free_port(), "--fastchat-controller", f"http://127.0.0.1:{controller}")
    address = ["--controller-address", f"http://127.0.0.1:{controller}"]
    second = stage.start([python, "-m", "fastchat.serve.openai_api_server", *at, str(port), *address], "fastchat-api")
    wait_for(stage, f"http://127.0.0.1:{port}/v1/models", until=lambda body: MODEL.encode() in body)
    return Running(f"http://127.0.0.1:{port}/v1", [first.pid, second.pid])
