"""`chaccu chat` in a terminal, with a model that it serves itself."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

_MODEL = "scripted:llama?tokens_per_s=20&text=" + "%20".join(f"word{number}" for number in range(60))


class Terminal:
    """A command with a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "chaccu.cli.main", *arguments])
        self.text = ""

    def write(self, text: str) -> None:
        os.write(self._end, text.encode())

    def wait_for(self, text: str, timeout_s: float = 30.0) -> None:
        """Read until `text` has come after what was waited for before; forgets what came up to it."""
        deadline_s = time.monotonic() + timeout_s
        while text not in self.text:
            ready, _, _ = select.select([self._end], [], [], 0.1)
            if ready:
                self.text += self._read()
            assert time.monotonic() < deadline_s, f"no {text!r} within {timeout_s:g} s in:\n{self.text}"
        self.text = self.text.partition(text)[2]

    def wait(self) -> int:
        """The exit code, once it has ended by itself."""
        deadline_s = time.monotonic() + 30
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            if select.select([self._end], [], [], 0.05)[0]:
                self.text += self._read()
            assert time.monotonic() < deadline_s, f"it did not end; it says:\n{self.text}"

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._end)

    def _read(self) -> str:
        try:
            return os.read(self._end, 65536).decode(errors="replace")
        except OSError:
            return ""


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal("chat", _MODEL)
    yield opened
    opened.close()


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in listed.split()]


def test_ctrl_c_stops_an_answer_and_not_the_server(terminal: Terminal) -> None:
    terminal.wait_for("llama at http://127.0.0.1:")
    terminal.wait_for("> ")
    server = children_of(terminal.pid)[0]
    terminal.write("begin\n")
    terminal.wait_for("word3")
    terminal.write("\x03")
    terminal.wait_for("(stopped)")
    assert "word30" not in terminal.text
    terminal.write("/nonsense\n")
    terminal.wait_for("! there is no command /nonsense")
    terminal.write("again\n")
    terminal.wait_for("word59")
    terminal.write("/quit\n")
    assert terminal.wait() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_sigterm_ends_the_server_too(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    server = children_of(terminal.pid)[0]
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_a_model_that_is_not_there_is_the_servers_own_error() -> None:
    command = [sys.executable, "-m", "chaccu.cli.main", "chat", "/nowhere/model"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.endswith("chaccu: there is no model at /nowhere/model.\n  try: check the path\n")
