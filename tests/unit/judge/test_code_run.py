from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from chaccu.errors import UsageError
from chaccu.judge import code_run
from chaccu.judge.checks import PythonCase, PythonCheck
from chaccu.judge.code_run import run_python_check

confined = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="code is confined on Linux on x86-64 only"
)


def returns(value: object, *args: object, timeout_s: float = 10.0, **more: Any) -> PythonCheck:
    return PythonCheck(function="f", cases=(PythonCase(args=args, returns=value),), timeout_s=timeout_s, **more)


@confined
def test_code_passes_by_what_it_returns() -> None:
    code = "Here you are:\n```python\nimport re, math, collections\nprint('noise')\ndef f(a, b):\n    return (a, b)\n```"
    assert run_python_check(code, returns([1, "x"], 1, "x")) == (True, "")
    assert run_python_check(code, returns([1, "y"], 1, "x")) == (False, "case 1 of 1 returned something else")


@confined
@pytest.mark.parametrize(
    "code",
    [
        "def g(): pass",
        "",
        "I would rather not.",
        "def f(: pass",
        "def f(): return {1}",
        "def f(): raise SystemExit",
        "def f(): return bytearray(10**9)[0]",
    ],
)
def test_code_with_a_fault_fails(code: str) -> None:
    assert run_python_check(code, returns(0)) == (False, "case 1 of 1 did not return")


@confined
@pytest.mark.parametrize(
    "answer",
    [
        "def f(a):\n    return a + 1",
        "This is the function:\n\ndef f(a):\n    return a + 1\n\nIt adds one to a.",
        "From here on:\nfrom math import floor\n@staticmethod\ndef f(a):\n    return floor(a) + 1\nDone!",
        "1. First\n   ```python\n   def f(a):\n       return a + 1\n   ```\n2. Then",
        "```python\ndef f(a):\n    return a + 1\n```\nIt prints:\n```\nTwo lines\n2\n```\nRun it:\n```bash\npython f.py\n```",
        "```\ndef f(a):\n    return a + 1\n```\nThe fault shows with\n```\nf('a')\nassert f(1) == 3\n```",
        "```python\nn = int(input('a: '))\n```\n```python\ndef f(a):\n    return a + 1\n```",
        "```python\ndef f(a):\n    return 'é'.count('é') + a\n```",
        "```python\ndef f(a):\n    return a + 1\n\ndef g(a):\n    retu",
        "import sys\ndef f(a):\n    return a + 1\nsys.exit(f(1))",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    a: int = 1\ndef f(a): return A(a).a + 1",
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    a: int\n"
        "def f(a): return A(a).a + 1",
    ],
)
def test_code_is_found_among_what_is_said_of_it(answer: str) -> None:
    assert run_python_check(answer, returns(2, 1)) == (True, "")


@confined
def test_modules_are_imported_before_files_are_out_of_reach() -> None:
    code = (
        "def f(day):\n    import heapq, collections.abc\n"
        "    from datetime import datetime\n    from xml.etree import ElementTree\n"
        "    try:\n        import numpy\n    except ImportError:\n        numpy = None\n"
        "    return datetime.strptime(day, '%Y-%m-%d').day"
    )
    assert run_python_check(code, returns(5, "2026-03-05")) == (True, "")


@confined
def test_what_a_function_may_not_change_or_use() -> None:
    appends = "def f(a):\n    a.append(1)\n    return a"
    assert run_python_check(appends, returns([0, 1], [0])) == (True, "")
    assert run_python_check(appends, returns([0, 1], [0], keeps_args=True)) == (False, "case 1 of 1 changed what it was given")
    assert run_python_check("def f(a): return [*a, 1]", returns([0, 1], [0], keeps_args=True)) == (True, "")
    without = returns(3, "1+2", without=("eval", "ast"))
    for code in (
        "def f(a): return eval(a)",
        "import ast\ndef f(a): return 3",
        "def f(a):\n    from ast import parse\n    return 3",
    ):
        assert run_python_check(code, without) == (False, "case 1 of 1 did not return")
    # Where the standard library uses them itself.
    assert run_python_check(
        "from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(a): return P(1, 3).b", without
    ) == (True, "")


@confined
def test_code_that_does_not_end_is_ended() -> None:
    reason = "case 1 of 1 did not return within 2 s"
    assert run_python_check("def f():\n    while True: pass", returns(0, timeout_s=2)) == (False, reason)
    assert run_python_check("import time\ndef f(): time.sleep(9)", returns(0, timeout_s=2)) == (False, reason)


@confined
def test_code_that_was_not_run_in_time_is_neither_right_nor_wrong() -> None:
    passed, reason = run_python_check("def f(): return 0", returns(0, timeout_s=0.001))
    assert passed is None
    assert reason == "the process that runs code was not ready within 0.001 s"


@confined
@pytest.mark.parametrize(
    "deed",
    [
        "import socket; socket.socket()",
        "open(path)",
        "open(path, 'rb')",
        "open('/proc/self/environ')",
        "open(f'/proc/{parent}/environ')",
        "os.listdir(path + '/..')",
        "open(path, 'w')",
        "open(path, 'a')",
        "os.unlink(path)",
        "os.rename(path, path + 'x')",
        "os.mkdir(path + 'd')",
        "os.chmod(path, 0)",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(parent, 0)",
        "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, parent)",
        "import fcntl; fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)",
        "import signal; signal.setitimer(signal.ITIMER_REAL, 1)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import ctypes; set_filter(ctypes)",
    ],
)
def test_the_kernel_refuses_what_is_not_computing(tmp_path: Path, deed: str) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    code = (
        "import os\ndef set_filter(ctypes):\n    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    if libc.prctl(22, 2, 0, 0, 0):\n        raise OSError(ctypes.get_errno(), 'prctl')\n"
        f"def f(path, parent):\n    try:\n        {deed}\n    except (OSError, ValueError) as error:\n"
        "        return 'refused' if getattr(error, 'errno', 1) == 1 else str(error)\n"
    )
    assert run_python_check(code, returns("refused", str(file), os.getpid())) == (True, "")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "kept"


@confined
def test_output_is_limited_and_the_environment_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    assert run_python_check("import os\ndef f(): return os.environ.get('SECRET')", returns(None)) == (True, "")
    assert run_python_check("import os\ndef f():\n    while True: os.write(1, b'x' * 65536)", returns(0))[0] is False
    forged = "import os\nos.write(1, b'[0]\\n')\ndef f(): return 1"
    assert run_python_check(forged, returns(0)) == (False, "the code wrote lines where only results stand")
    thread = "threading.Thread(target=print).start()"
    threads = f"import threading\ndef f():\n    try:\n        {thread}\n    except RuntimeError:\n        return 0"
    assert run_python_check(threads, returns(0)) == (True, "")


def test_code_is_not_run_where_it_cannot_be_confined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(code_run.platform, "machine", lambda: "riscv64")
    mark = tmp_path / "ran"
    with pytest.raises(UsageError, match="on x86-64 only"):
        run_python_check(f"open({str(mark)!r}, 'w')", returns(0))
    assert not mark.exists()


@confined
def test_code_is_not_run_where_the_kernel_does_not_confine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = Path(code_run.__file__).with_name("confined_program.py").read_text()
    # A filter of another kind is what an old kernel makes of a filter: invalid.
    (tmp_path / "confined_program.py").write_text(
        program.replace("_FILTER_MODE = 1, 38, 22, 2", "_FILTER_MODE = 1, 38, 22, 99")
    )
    monkeypatch.setattr(code_run, "__file__", str(tmp_path / "code_run.py"))
    with pytest.raises(UsageError, match=r"confine itself \(seccomp\): \[Errno 22\]"):
        run_python_check("def f(): return 0", returns(0))
