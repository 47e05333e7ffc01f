"""`serve_while`: one model served on this machine as long as a block runs, by the `chaccu serve` command.

Invariants: when the block begins, the server answers; when it ends, by whatever exception or by SIGTERM or SIGHUP, the server
has ended. The server is out of reach of the terminal's Ctrl-C, which is for the conversation.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from chaccu.errors import ServeError

_POLL_S = 0.05
_STOP_S = 15.0
_SEND_AGAIN_S = 0.3
_SERVE = (sys.executable, "-m", "chaccu.cli.main", "serve")
_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def serve_while(model: str, announce: Callable[[str], None]) -> Iterator[str]:
    """The URL of a gateway that serves `model`. Raises `ServeError` with the server's own words when it does not come up."""
    with tempfile.TemporaryDirectory(prefix="chaccu-chat-") as folder, _ending_by_signals():
        log_file, port_file = Path(folder, "serve.log"), Path(folder, "url")
        announce(f"loading {model} …")
        with log_file.open("wb") as log:
            # Nobody but this process asks it anything.
            server = subprocess.Popen(
                [*_SERVE, model, "--port", "0", "--port-file", str(port_file), "--drain", "0"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while not port_file.is_file():
                if server.poll() is not None:
                    raise _explain(model, server.returncode, log_file)
                time.sleep(_POLL_S)
            yield port_file.read_text(encoding="utf-8").strip()
        finally:
            _stop(server)


def _explain(model: str, exit_code: int, log_file: Path) -> ServeError:
    said = log_file.read_text(encoding="utf-8", errors="replace").strip()
    message, _, remedy = said.rpartition("chaccu: ")[2].partition("\n  try: ")
    if not message:
        message = f"the server of {model} ended with exit code {exit_code} and said nothing."
    return ServeError(message, remedy=remedy)


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
    try:
        server.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextlib.contextmanager
def _ending_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block like an exception, so that what it started ends too."""

    def end(number: int, frame: FrameType | None) -> None:
        for ending in _ENDING:
            signal.signal(ending, signal.SIG_IGN)
        sys.exit(128 + number)

    former = {number: signal.signal(number, end) for number in _ENDING}
    reading_end, writing_end = os.pipe()
    os.set_blocking(writing_end, False)
    former_end = signal.set_wakeup_fd(writing_end, warn_on_full_buffer=False)
    again = threading.Thread(target=_send_again, args=(reading_end, threading.get_ident()), daemon=True)
    again.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former_end)
        os.close(writing_end)
        again.join()
        os.close(reading_end)
        for number, action in former.items():
            signal.signal(number, action)


def _send_again(reading_end: int, thread_id: int) -> None:
    """Send an ending signal once more: `input` waits for a key in C, and one that comes just before it waits goes unseen."""
    while number := os.read(reading_end, 1):
        if number[0] in _ENDING:
            time.sleep(_SEND_AGAIN_S)
            signal.pthread_kill(thread_id, number[0])
