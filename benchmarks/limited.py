"""Running a command in processes of its own, for a limited time, with what it wrote last; and reading a trainer's result line.

Invariants: no process that the command began in its group outlives the call; what is kept of an output names no folders.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LAST_LINES = 12
_GIB = 2**30 / 1e9
_FOLDERS = re.compile(r"(?<![\w./:~-])~?/(?:[\w.@+~-]+/)+")


def _number(name: str) -> str:
    return rf"(?P<{name}>\d[\d,]*(?:\.\d+)?)"


_RESULT = re.compile(
    rf"^RESULT\s+(?P<name>[^:]+):.*?{_number('rate')}\s+(?:useful\s+)?tok(?:en)?s?/s"
    rf".*?\bMFU\s+{_number('mfu')}.*?\bpeak\s+{_number('peak')}\s*(?P<unit>GiB|GB)\b",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, None when it was ended at its limit or could not be started; wall seconds; all that
    it wrote, standard output and error together."""

    exit_code: int | None
    wall_s: float
    output: str

    @property
    def last_lines(self) -> list[str]:
        """The end of the output, without folders."""
        lines = [line.rstrip() for line in self.output.splitlines() if line.strip()]
        return [hide_folders(line)[:300] for line in lines[-LAST_LINES:]]


def run_limited(command: Sequence[str], *, limit_s: float, folder: Path | None = None) -> Ended:
    """Run a command to its end, or for `limit_s`, after which it and its children are killed."""
    begun = time.monotonic()
    # A file, not a pipe: one that a child has left open would be waited for.
    with tempfile.TemporaryFile() as written:
        try:
            process = subprocess.Popen(
                [*command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Ended(None, 0.0, f"cannot be started: {error}")
        exit_code: int | None = None
        try:
            exit_code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Children that are left as well, and everything when this process itself is being ended.
            _kill_group(process.pid)
            process.wait()
        took_s = time.monotonic() - begun
        written.seek(0)
        return Ended(exit_code, took_s, written.read().decode(errors="replace"))


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # they have all ended
        return


def hide_folders(text: str) -> str:
    """A text with the folders of its absolute paths left out: a result is passed on, the machine it came from is not."""
    return _FOLDERS.sub("", text)


@dataclass(frozen=True)
class RivalResult:
    """What another trainer's bench says of itself; gigabytes of 10⁹ bytes."""

    name: str
    useful_tokens_per_s: float
    mfu: float
    peak_gb: float


def parse_rival(output: str) -> RivalResult | None:
    """The last line such as `RESULT trainer shape=1b: 9,000 useful tok/s, MFU 0.061, peak 47.5 GiB` in an output; None when
    there is none with all three figures."""
    every = list(_RESULT.finditer(output))
    if not every:
        return None
    found = every[-1]
    rate, mfu, peak = (float(found[name].replace(",", "")) for name in ("rate", "mfu", "peak"))
    return RivalResult(found["name"].strip(), rate, mfu, round(peak * (_GIB if found["unit"] == "GiB" else 1), 1))
