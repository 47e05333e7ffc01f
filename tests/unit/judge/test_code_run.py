from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

from chaccu.errors import UsageError
from chaccu.judge import code_run
from chaccu.judge.checks import PythonCase, PythonCheck
from chaccu.judge.code_run import run_python_check

confined = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="code is confined on Linux on x86-64 only"
)


def returns(value: object, *args: object, timeout_s: float = 10.0) -> PythonCheck:
    return PythonCheck(function="f", cases=(PythonCase(args=args, returns=value),), timeout_s=timeout_s)


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
        "def f(: pass",
        "def f(): return {1}",
        "def f(): raise SystemExit",
        "def f(): return bytearray(10**9)[0]",
    ],
)
def test_code_with_a_fault_fails(code: str) -> None:
    assert run_python_check(code, returns(0)) == (False, "case 1 of 1 did not return")


@confined
def test_code_that_does_not_end_is_ended() -> None:
    reason = "case 1 of 1 did not return within 0.5 s"
    assert run_python_check("def f():\n    while True: pass", returns(0, timeout_s=0.5)) == (False, reason)


@confined
@pytest.mark.parametrize(
    "deed",
    [
        "import socket; socket.socket()",
        "open(path, 'w')",
        "open(path, 'a')",
        "os.unlink(path)",
        "os.rename(path, path + 'x')",
        "os.mkdir(path + 'd')",
        "os.chmod(path, 0)",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(parent, 0)",
    ],
)
def test_the_kernel_refuses_what_is_not_computing(tmp_path: Path, deed: str) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    code = f"import os\ndef f(path, parent):\n    try:\n        {deed}\n    except PermissionError:\n        return 'refused'\n"
    assert run_python_check(code, returns("refused", str(file), os.getpid())) == (True, "")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "kept"


@confined
def test_output_is_limited_and_the_environment_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    assert run_python_check("import os\ndef f(): return os.environ.get('SECRET')", returns(None)) == (True, "")
    assert run_python_check("import os\ndef f():\n    while True: os.write(1, b'x' * 65536)", returns(0))[0] is False


def test_code_is_not_run_where_it_cannot_be_confined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(code_run.platform, "machine", lambda: "riscv64")
    mark = tmp_path / "ran"
    with pytest.raises(UsageError, match="on x86-64 only"):
        run_python_check(f"open({str(mark)!r}, 'w')", returns(0))
    assert not mark.exists()
