"""A program by itself: takes away its own rights, then runs a function of code that nobody trusts. `code_run` starts it.

Invariants: once the code runs, this process can compute, and write at most `_MOST_OUTPUT` to its standard output; the kernel
refuses it everything else: to open a file, for reading too, or a socket, to start a process or thread, to signal another. The
modules that the code names are imported before, when files can be read and none of the code has run. This process does not know
what the function should return, so the code cannot claim to be right. It knows system calls by number: Linux on x86-64 only.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import importlib
import io
import json
import os
import resource
import signal
import struct
import sys
import textwrap
from collections.abc import Iterator, Sequence
from types import CodeType, ModuleType
from typing import Any

_MOST_MEMORY = 1 << 29
_MOST_OUTPUT = 1 << 20

# read write close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 access
# sched_yield mremap madvise nanosleep getpid exit getcwd readlink gettimeofday getrusage sysinfo times getuid getgid geteuid
# getegid sigaltstack gettid time futex sched_getaffinity getdents64 clock_gettime clock_getres clock_nanosleep exit_group
# newfstatat readlinkat faccessat set_robust_list getrandom statx rseq faccessat2
_CALLS = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 21, 24, 25, 28, 35, 39, 60, 79, 89, 96, 98, 99, 100, 102, 104]
_CALLS += [107, 108, 131, 186, 201, 202, 204, 217, 228, 229, 230, 231, 262, 267, 269, 273, 318, 332, 334, 439]
_OPEN, _OPENAT, _FCNTL, _PRCTL = 2, 257, 72, 157
# Places of the arguments in what a filter sees of a call.
_FIRST, _SECOND, _THIRD = 16, 24, 32
_FLAGS_THAT_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# fcntl(2) can also have the kernel send signals to any process: its commands are these, F_GETFD, F_SETFD and F_GETFL.
_HARMLESS_COMMANDS = (1, 2, 3)

_X86_64 = 0xC000003E
_LOAD, _EQUALS, _HAS_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050001
_DIE_WITH_PARENT, _NO_NEW_RIGHTS, _SET_FILTER, _FILTER_MODE = 1, 38, 22, 2
# Imported by the standard library in mid-call, when no file can be opened any more.
_LATE_IMPORTS = ("_strptime", "weakref")
_CODE_BEGINS = ("def ", "async def ", "class ", "import ", "from ", "@")

_Steps = list[tuple[int, int, int, int]]


def build_first_filter() -> _Steps:
    """Classic BPF, as seccomp(2) takes it: the calls above, files for reading, and a second filter; all others are refused."""
    steps: _Steps = [(_LOAD, 0, 0, 4), (_EQUALS, 1, 0, _X86_64), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for call in _CALLS:
        steps += [(_EQUALS, 0, 1, call), (_RETURN, 0, 0, _ALLOW)]
    for call, place in ((_OPEN, _SECOND), (_OPENAT, _THIRD)):
        steps += [(_EQUALS, 0, 4, call), (_LOAD, 0, 0, place)]
        steps += [(_HAS_BITS, 0, 1, _FLAGS_THAT_WRITE), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    for call, place, values in ((_FCNTL, _SECOND, _HARMLESS_COMMANDS), (_PRCTL, _FIRST, (_SET_FILTER,))):
        steps += [(_EQUALS, 0, 2 + 2 * len(values), call), (_LOAD, 0, 0, place)]
        for value in values:
            steps += [(_EQUALS, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        steps.append((_RETURN, 0, 0, _REFUSE))
    return [*steps, (_RETURN, 0, 0, _REFUSE)]


def build_second_filter() -> _Steps:
    """What is taken away on top of the first, before the code runs: every opening of a file, and further filters."""
    steps: _Steps = [(_LOAD, 0, 0, 0)]
    for call in (_OPEN, _OPENAT, _PRCTL):
        steps += [(_EQUALS, 0, 1, call), (_RETURN, 0, 0, _REFUSE)]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def install_filter(steps: _Steps) -> None:
    """For good, and on top of those before. Raises `OSError` where the kernel does not do that."""
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(instructions)))
    _control(_SET_FILTER, _FILTER_MODE, ctypes.addressof(program))


def confine(cpu_s: int) -> None:
    """Give up all rights but to compute and to read files. Raises `OSError` where the kernel does not do that."""
    for limit, most in (
        (resource.RLIMIT_AS, _MOST_MEMORY),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, _MOST_OUTPUT),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (least, least))
    _control(_DIE_WITH_PARENT, signal.SIGKILL)
    _control(_NO_NEW_RIGHTS, 1)
    install_filter(build_first_filter())


def _control(option: int, *values: int) -> None:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    if prctl(option, *values, *[0] * (4 - len(values))):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def find_code(blocks: Sequence[str]) -> list[tuple[ast.Module, CodeType]]:
    """Of each block what is Python: all of it, or the longest run of lines from the first that begins like code.

    Blocks of other things (a command, what the code prints) have none. Around code without fences stands prose.
    """
    return [found for block in blocks if (found := next(filter(None, map(_compile, _candidates(block))), None))]


def _candidates(block: str) -> Iterator[str]:
    text = textwrap.dedent(block)
    yield text
    lines = text.splitlines()
    for first, line in enumerate(lines):
        if line.startswith(_CODE_BEGINS):
            for end in range(len(lines), first, -1):
                yield "\n".join(lines[first:end])


def _compile(text: str) -> tuple[ast.Module, CodeType] | None:
    try:
        tree = ast.parse(text)
        return tree, compile(tree, "answer", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def import_modules(trees: Sequence[ast.Module]) -> None:
    """Those that the code names, while their files can be read. One that is not there is missed later, by the code itself."""
    names = set(_LATE_IMPORTS)
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in sorted(names):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def build_namespace(without: Sequence[str]) -> dict[str, Any]:
    """Of the module `answer`, in which the code runs: the built-in names but those of `without`, which it cannot import."""

    def import_others(name: str, *others: Any) -> Any:
        if name.partition(".")[0] in without:
            raise ImportError(f"{name} is not to be used")
        return builtins.__import__(name, *others)

    names = {name: value for name, value in vars(builtins).items() if name not in without}
    module = sys.modules["answer"] = ModuleType("answer")
    vars(module)["__builtins__"] = names | {"__import__": import_others}
    return vars(module)


def main() -> None:
    """One JSON object from stdin (`blocks`, `function`, `calls`, `keeps_args`, `without`, `cpu_s`).

    To stdout: `confined`, or why it cannot be; then, until a fault, a JSON line a call, `[what it returned]` or, with
    `keeps_args`, `[what it returned, the arguments after it]`.
    """
    request: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    out, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
    try:
        confine(request["cpu_s"])
    except (OSError, ValueError) as error:
        out.write(f"{error}\n")
        return
    out.write("confined\n")
    out.flush()
    pieces = find_code(request["blocks"])
    import_modules([tree for tree, _ in pieces])
    install_filter(build_second_filter())
    names = build_namespace(request["without"])
    for _, code in pieces:
        # An example that fails, of use or of the fault that was asked about, does not undo a function that is right.
        with contextlib.suppress(Exception, SystemExit):
            exec(code, names)
    for arguments in request["calls"]:
        returned = names[request["function"]](*arguments)
        out.write(json.dumps([returned, arguments] if request["keeps_args"] else [returned]) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
