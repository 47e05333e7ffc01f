"""`GuardedChild`: a program that an engine runs, which does not outlive this process.

Invariants: whatever ends this process, SIGKILL included, ends the program with its whole process group (`guard.py`); what it
says goes to our log line by line, and its last words are kept. It ignores what the program does.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

_log = logging.getLogger(__name__)
_GRACE_S = 10.0
_KEPT_LINES = 40
_TOLD_LINES = 6


class GuardedChild:
    """Starts `command` at once, with `environment` as its whole environment."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        guard = Path(__file__).with_name("guard.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(guard), str(_GRACE_S), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            process_group=0,  # the terminal's Ctrl-C is for this process, which ends the program in order
        )
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reader = threading.Thread(target=self._read, name="chaccu-child-words", daemon=True)
        self._reader.start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """What it said at the end of its life, in one line."""
        self._reader.join(1.0)  # its last lines may still be on their way
        return " | ".join(list(self._lines)[-_TOLD_LINES:])

    def close(self) -> None:
        """End it with all that it has started, and wait: until it obeys SIGTERM, `_GRACE_S` at most."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join(1.0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as words:
            for line in words:
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    self._lines.append(text)
                    # Its own levels stand in its lines; operators need all of them while it loads.
                    _log.warning("%s", text)
