"""The demo's processes: a gateway, a worker a model and the chat page, started together and always stopped.

Invariant: what was started here is stopped here, by its pid, whatever ends the block.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from chaccu.errors import ServeError

_POLL_S = 0.1
_STOP_S = 15.0


class Services:
    """Child processes of one demo."""

    def __init__(self) -> None:
        self._children: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="chaccu-demo-"))

    def start(self, name: str, arguments: Sequence[str]) -> int:
        """Start `chaccu ARGUMENTS…` in a process group of its own (Ctrl-C reaches only the demo); returns its pid."""
        log = (self._folder / f"{name}.log").open("wb")
        with log:
            child = subprocess.Popen(
                [sys.executable, "-m", "chaccu.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append((name, child))
        return child.pid

    def start_with_url(self, name: str, arguments: Sequence[str], url_option: str, timeout_s: float = 60) -> str:
        """Start a command that writes its URL to a file once it listens; returns the URL. Raises `ServeError` with its log."""
        file = self._folder / f"{name}.url"
        self.start(name, [*arguments, url_option, str(file)])
        self.wait(f"the {name}", file.exists, timeout_s)
        return file.read_text(encoding="utf-8").strip()

    def wait(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait until `condition()` is true. Raises `ServeError` when a child has ended or the time is over."""
        end = time.monotonic() + timeout_s
        while not condition():
            for name, child in self._children:
                if child.poll() is not None:
                    raise ServeError(f"the {name} ended with exit code {child.returncode}:\n{self._log(name)}")
            if time.monotonic() > end:
                raise ServeError(
                    f"{what} was not ready after {timeout_s:.0f} s.", remedy="look at what else this machine is doing"
                )
            time.sleep(_POLL_S)

    def _log(self, name: str) -> str:
        text = (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.strip().splitlines()[-5:])

    def stop(self) -> None:
        """Terminate every child and wait for it; one that does not go in time is killed."""
        for _, child in reversed(self._children):
            if child.poll() is None:
                child.terminate()
        end = time.monotonic() + _STOP_S
        for _, child in self._children:
            try:
                child.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for file in self._folder.iterdir():
            file.unlink()
        self._folder.rmdir()


@contextlib.contextmanager
def running_services() -> Iterator[Services]:
    """Services that are stopped when the block ends."""
    services = Services()
    try:
        yield services
    finally:
        services.stop()
