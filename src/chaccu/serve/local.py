"""`serve_locally`: a gateway and one worker a model on this machine, as one command.

Invariants: every child is a process group of its own, ended by its id and waited for, whatever ends this process short of
SIGKILL; the gateway ends first, for the workers have yet to answer what is under way there; a worker that dies after it had
joined is started again, one that never joins ends the whole with its own message on stderr. It ignores how gateway and workers
work: it only starts their commands and asks the gateway who has joined.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode

import msgspec

from chaccu.artifact import atomic_file
from chaccu.errors import ChildFailedError, ServeError

_POLL_S = 0.05
_GATEWAY_START_S = 30.0
_STOP_S = 5.0
_RESTART_DELAY_S = 0.5


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model to serve: the `name` it joins under, and the arguments of its `chaccu worker` command."""

    name: str
    worker_arguments: tuple[str, ...]


class _Child:
    """A `chaccu` command running as a child process."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = tuple(arguments)
        command = [sys.executable, "-m", "chaccu.cli.main", *arguments]
        # Its own group: Ctrl-C in the terminal reaches this process alone, which ends its children in order.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self, deadline_s: float) -> None:
        """Wait until it has ended; after `deadline_s` (monotonic) it is killed."""
        try:
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve_locally(
    gateway_arguments: Sequence[str],
    models: Sequence[LocalModel],
    announce: Callable[[str], None],
    *,
    port_file: Path | None = None,
    drain_s: float = 0.0,
) -> None:
    """Serve `models` until SIGTERM or Ctrl-C. `port_file` gets the gateway's URL once every model answers; `drain_s`: how long
    the gateway may take to end, as its arguments have it; a second signal ends it at once.

    Raises `ChildFailedError` when the gateway or a worker cannot start, which then says why itself.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sigterm_as_interrupt())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaccu-")))
        if port_file is not None:
            port_file.unlink(missing_ok=True)
            stack.callback(port_file.unlink, missing_ok=True)
        children: list[_Child] = []
        stack.callback(_stop, children, drain_s)
        gateway = _Child(["gateway", *gateway_arguments, "--port-file", str(folder / "url")])
        children.append(gateway)
        url = _wait_for_url(gateway, folder / "url")
        workers = {model.name: _Child(["worker", *model.worker_arguments, "--gateway", url]) for model in models}
        children.extend(workers.values())
        _wait_for_workers(url, gateway, workers)
        if port_file is not None:
            with atomic_file(port_file) as file:
                file.write(url.encode() + b"\n")
        announce(f"serving {', '.join(workers)} at {url}/v1 (Ctrl-C stops)")
        _watch(gateway, workers, children, announce)


def _wait_for_url(gateway: _Child, port_file: Path) -> str:
    deadline_s = time.monotonic() + _GATEWAY_START_S
    while not port_file.is_file():
        if gateway.exit_code is not None:
            raise ChildFailedError("the gateway did not start.")
        if time.monotonic() > deadline_s:
            raise ServeError(f"the gateway was not ready within {_GATEWAY_START_S:g} s.", remedy="look at its messages above")
        time.sleep(_POLL_S)
    return port_file.read_text(encoding="utf-8").strip()


def _wait_for_workers(url: str, gateway: _Child, workers: dict[str, _Child]) -> None:
    """Wait until all have joined, however long their models take to load."""
    while not all(_is_served(url, name) for name in workers):
        for name, worker in workers.items():
            if worker.exit_code is not None:
                raise ChildFailedError(f"the worker of {name} did not start.")
        if gateway.exit_code is not None:
            raise ChildFailedError("the gateway has ended.")
        time.sleep(_POLL_S)


def _is_served(url: str, model: str) -> bool:
    """Whether the gateway has a worker of `model`; it tells so without a key."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/ready?{urlencode({'model': model})}", timeout=_GATEWAY_START_S):
            return True
    except HTTPError as answer:
        answer.close()
        return False


def _watch(gateway: _Child, workers: dict[str, _Child], children: list[_Child], announce: Callable[[str], None]) -> None:
    """Start workers again that die; returns never, ends by an exception."""
    while True:
        time.sleep(_POLL_S)
        if gateway.exit_code is not None:
            raise ServeError(f"the gateway has ended with exit code {gateway.exit_code}.")
        for name, worker in workers.items():
            if worker.exit_code is not None:
                announce(f"the worker of {name} has ended with exit code {worker.exit_code}; starting it again")
                time.sleep(_RESTART_DELAY_S)
                children.remove(worker)
                workers[name] = _Child(worker.arguments)
                children.append(workers[name])


def _stop(children: list[_Child], drain_s: float) -> None:
    """End the gateway, which is the first child, once it has answered what is under way, and then the workers."""
    with contextlib.suppress(KeyboardInterrupt):
        for gateway in children[:1]:
            gateway.terminate()
            gateway.wait(time.monotonic() + drain_s + _STOP_S)
    # Told again, a gateway ends at once.
    for child in children:
        child.terminate()
    deadline_s = time.monotonic() + _STOP_S
    for child in children:
        child.wait(deadline_s)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM unwinds the stack as Ctrl-C does, so that children are ended."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
