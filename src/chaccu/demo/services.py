"""The demo's processes: a gateway, a worker a model and the chat page, started together and always stopped.

Invariant: what was started here is stopped here, by its pid, whatever ends the block.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from chaccu.errors import ServeError

_POLL_S = 0.1
_STOP_S = 15.0


class _Child(msgspec.Struct):
    name: str
    arguments: tuple[str, ...]
    process: subprocess.Popen[bytes]
    told: bool = False


class Services:
    """Child processes of one demo."""

    def __init__(self) -> None:
        self._children: list[_Child] = []
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
        self._children.append(_Child(name, tuple(arguments), child))
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
            for child in self._children:
                if (code := child.process.poll()) is not None:
                    raise ServeError(f"the {child.name} ended with exit code {code}:\n{self._log(child.name)}")
            if time.monotonic() > end:
                raise ServeError(
                    f"{what} was not ready after {timeout_s:.0f} s.", remedy="look at what else this machine is doing"
                )
            time.sleep(_POLL_S)

    def describe(self) -> str:
        """Names and process ids of what runs."""
        return ", ".join(f"{child.name} (pid {child.process.pid})" for child in self._children)

    def newly_ended(self) -> Iterator[str]:
        """A sentence for every child that has ended and was not told of before, with the command that starts it again."""
        for child in self._children:
            if not child.told and (code := child.process.poll()) is not None:
                child.told = True
                why = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                yield f"the {child.name} {why}; start it again with: {shlex.join(['chaccu', *child.arguments])}"

    def _log(self, name: str) -> str:
        text = (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.strip().splitlines()[-5:])

    def stop(self) -> None:
        """Terminate every child and wait for it; one that does not go in time is killed."""
        processes = [child.process for child in self._children]
        for process in reversed(processes):
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + _STOP_S
        for process in processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
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
