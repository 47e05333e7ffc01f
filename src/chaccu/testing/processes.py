"""Real gateways, workers and other commands for tests, on ports that the kernel picks.

Invariants: a service is ready when its starting call returns; it is stopped by its own process id, and waited for. Its messages
are kept in a file in the folder given, and shown when it does not start.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from chaccu.errors import ServeError

_START_S = 60.0
_STOP_S = 10.0
_POLL_S = 0.02


class Service:
    """A running `chaccu` command. As a context manager it is stopped at the end of the block."""

    def __init__(self, process: subprocess.Popen[bytes], log_file: Path, url: str = "") -> None:
        self._process = process
        self._log_file = log_file
        self.url = url

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written to stdout and stderr so far."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal to it (and to nothing else)."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self._process.kill()
        self._process.wait()

    def stop(self, timeout_s: float = _STOP_S) -> int:
        """SIGTERM, and wait; kills after `timeout_s`. Returns the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = _STOP_S) -> int:
        """Wait until it has ended; kills after `timeout_s`. Returns the exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def start_command(folder: Path, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Service:
    """Start `chaccu ARGUMENTS`, its messages in a new file in `folder`; does not wait for anything."""
    folder.mkdir(parents=True, exist_ok=True)
    log_file = next(path for n in itertools.count() if not (path := folder / f"{arguments[0]}-{n}.log").exists())
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "chaccu.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            process_group=0,
        )
    return Service(process, log_file)


def start_with_url(
    folder: Path, arguments: Sequence[str], *, url_option: str = "--port-file", timeout_s: float = _START_S
) -> Service:
    """Start a command that writes its URL to the file given with `url_option`, and wait until it has. Raises `ServeError`."""
    folder.mkdir(parents=True, exist_ok=True)
    url_file = next(path for n in itertools.count() if not (path := folder / f"{arguments[0]}-{n}.url").exists())
    service = start_command(folder, [*arguments, url_option, str(url_file)])
    wait_until(url_file.is_file, service, timeout_s=timeout_s)
    service.url = url_file.read_text(encoding="utf-8").strip()
    return service


def start_gateway(folder: Path, *arguments: str, port: int = 0) -> Service:
    """A gateway that listens; `url` is its address."""
    return start_with_url(folder, ["gateway", "--port", str(port), *arguments])


def start_worker(folder: Path, gateway: Service | str, model: str, *arguments: str, timeout_s: float = _START_S) -> Service:
    """A worker of `model` that has joined `gateway` (a service or a URL)."""
    url = gateway if isinstance(gateway, str) else gateway.url
    service = start_command(folder, ["worker", "--model", model, "--gateway", url, *arguments])
    wait_until(lambda: "worker ready" in service.log, service, timeout_s=timeout_s)
    return service


def start_serve(folder: Path, *arguments: str, timeout_s: float = _START_S) -> Service:
    """`chaccu serve ARGUMENTS` on a free port, with every model answering; `url` is the gateway's."""
    return start_with_url(folder, ["serve", *arguments, "--port", "0"], timeout_s=timeout_s)


def list_workers(gateway: Service | str) -> list[dict[str, object]]:
    """The gateway's list of workers, as its `/admin/workers` gives it."""
    url = gateway if isinstance(gateway, str) else gateway.url
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/admin/workers", timeout=_STOP_S) as response:
        workers: list[dict[str, object]] = msgspec.json.decode(response.read())
        return workers


def wait_until(condition: Callable[[], bool], service: Service, *, timeout_s: float = _START_S) -> None:
    """Wait for `condition`. Raises `ServeError` with the service's messages when it ends first or time is up."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        ended = service.exit_code
        if ended is not None or time.monotonic() > deadline_s:
            log = service.log
            service.kill()
            why = f"ended with exit code {ended}" if ended is not None else f"was not ready within {timeout_s:g} s"
            raise ServeError(f"a test's process {why}; it said:\n{log}")
        time.sleep(_POLL_S)
