"""A Redis or Valkey server for tests, on a port that the kernel picks; it keeps nothing on disk."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from chaccu.errors import ServeError

_START_S = 10.0


def find_server() -> str | None:
    """The program, where one is installed."""
    return shutil.which("redis-server") or shutil.which("valkey-server")


def pick_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def redis_server(folder: Path, *, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that answers, and its URL; ended by its process id. Raises `ServeError` when it does not start."""
    program = find_server()
    if program is None:
        raise ServeError("no Redis server is installed.", remedy="apt-get install redis-server")
    port = pick_port() if port is None else port
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port, process)
        yield f"redis://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise ServeError(f"the Redis server on port {port} did not start.")
        time.sleep(0.02)
