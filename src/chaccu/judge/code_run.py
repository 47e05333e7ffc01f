"""`run_python_check`: whether the code of an answer does what a check says, run in a process that cannot do anything else.

Invariants: the code runs only in `confined_program`, without this process's environment, and is killed at its time limit; what
it returns is compared here and kept nowhere. Where it cannot be confined, it is not run. It ignores how good the code is.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from chaccu.errors import UsageError
from chaccu.judge.checks import PythonCheck, read_code_blocks

_WITHOUT_CODE = "leave --run-code out: answers with code are counted as unchecked then"


def require_confinement() -> None:
    """Raise `UsageError` where code cannot be confined."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise UsageError(
            f"a model's code is run on Linux on x86-64 only, and this is {sys.platform} on {platform.machine()}.",
            remedy=_WITHOUT_CODE,
        )


def run_python_check(answer: str, check: PythonCheck) -> tuple[bool | None, str]:
    """Whether the code of `answer` passes, and why not; None where the process did not come to run it in time.

    Blocks for `check.timeout_s` seconds at most. Raises `UsageError` where the code cannot be confined.
    """
    require_confinement()
    request = {
        "blocks": read_code_blocks(answer),
        "function": check.function,
        "calls": [case.args for case in check.cases],
        "keeps_args": check.keeps_args,
        "without": check.without,
        "cpu_s": int(check.timeout_s) + 1,
    }
    program = Path(__file__).with_name("confined_program.py")
    code: int | None = None
    limit = ""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryDirectory() as folder:
        try:
            code = subprocess.run(
                [sys.executable, "-I", "-S", str(program)],
                input=msgspec.json.encode(request),
                stdout=out,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=check.timeout_s,
                start_new_session=True,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            limit = f" within {check.timeout_s:g} s"
        out.seek(0)
        first, *lines = out.read().split(b"\n")
    if first == b"confined":
        return _compare(lines, check, limit)
    if limit:
        return None, f"the process that runs code was not ready{limit}"
    why = first.decode(errors="replace") or f"it ended with code {code}"
    raise UsageError(f"this system does not let a process confine itself (seccomp): {why}.", remedy=_WITHOUT_CODE)


def _compare(lines: list[bytes], check: PythonCheck, limit: str) -> tuple[bool, str]:
    # After the last line's end comes an empty piece; a line that was cut off is that piece.
    returned = lines[:-1]
    if len(returned) > len(check.cases):
        return False, "the code wrote lines where only results stand"
    for number, case in enumerate(check.cases, start=1):
        place = f"case {number} of {len(check.cases)}"
        if number > len(returned):
            return False, f"{place} did not return{limit}"
        try:
            value, *after = msgspec.json.decode(returned[number - 1], type=list)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return False, f"{place} returned no JSON value"
        if value != case.returns:
            return False, f"{place} returned something else"
        if check.keeps_args and after != [list(case.args)]:
            return False, f"{place} changed what it was given"
    return True, ""
