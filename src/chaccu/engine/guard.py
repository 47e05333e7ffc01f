"""Runs a command, and ends it with all that it has started when the guard's own standard input ends.

    python -I guard.py GRACE_S COMMAND…

Whoever starts the guard holds the other end of that input: when he dies, of whatever cause, the system closes it. The command
leads a process group. Invariants: once the command has ended, or the input, nothing of the group is left; the guard ends with
the command's exit code. It ignores processes that have left the group. Only the standard library: it starts fast.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")
    # The guard ends by its input alone: whoever meant the command by a signal may close that.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_input, args=(child, grace_s), daemon=True).start()
    code = child.wait()
    _signal_group(child, signal.SIGKILL)
    sys.exit(code if code >= 0 else 128 - code)


def _end_with_input(child: subprocess.Popen[bytes], grace_s: float) -> None:
    while os.read(0, 1024):
        pass
    _signal_group(child, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(grace_s)
    _signal_group(child, signal.SIGKILL)


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    main()
