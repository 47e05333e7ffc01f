"""A program by itself: takes away its own rights, then runs a function of code that nobody trusts. `code_run` starts it.

Invariants: once the code runs, this process can read files, compute, and write at most `_MOST_OUTPUT` to its standard output;
the kernel refuses it everything else: to change files, open a socket, start a process, signal another. It does not know what
the function should return, so the code cannot claim to be right. It knows system calls by number: Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

_MOST_MEMORY = 1 << 29
_MOST_OUTPUT = 1 << 20

# read write close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 access
# sched_yield mremap madvise nanosleep getpid exit fcntl getcwd readlink gettimeofday getrusage sysinfo times getuid getgid
# geteuid getegid sigaltstack gettid time futex sched_getaffinity getdents64 clock_gettime clock_getres clock_nanosleep
# exit_group newfstatat readlinkat faccessat set_robust_list getrandom statx rseq faccessat2
_CALLS = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 21, 24, 25, 28, 35, 39, 60, 72, 79, 89, 96, 98, 99, 100, 102]
_CALLS += [104, 107, 108, 131, 186, 201, 202, 204, 217, 228, 229, 230, 231, 262, 267, 269, 273, 318, 332, 334, 439]
# open and openat, with the place of their flags in the call's data: for reading only.
_OPENING = {2: 24, 257: 32}
_FLAGS_THAT_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_X86_64 = 0xC000003E
_LOAD, _EQUALS, _HAS_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050001
_DIE_WITH_PARENT, _NO_NEW_RIGHTS, _SET_FILTER, _FILTER_MODE = 1, 38, 22, 2


def build_filter() -> bytes:
    """The instructions (classic BPF, as seccomp(2) takes them) that let the calls above through and refuse all others."""
    steps = [(_LOAD, 0, 0, 4), (_EQUALS, 1, 0, _X86_64), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for call in _CALLS:
        steps += [(_EQUALS, 0, 1, call), (_RETURN, 0, 0, _ALLOW)]
    for call, place in _OPENING.items():
        steps += [(_EQUALS, 0, 4, call), (_LOAD, 0, 0, place)]
        steps += [(_HAS_BITS, 0, 1, _FLAGS_THAT_WRITE), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def confine(cpu_s: int) -> None:
    """Give up all rights but those above, for good. Raises `OSError` where the kernel does not do that."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_OUTPUT, _MOST_OUTPUT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = build_filter()
    instructions = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(instructions)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 4
    if (
        prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        or prctl(_NO_NEW_RIGHTS, 1, 0, 0, 0)
        or prctl(_SET_FILTER, _FILTER_MODE, ctypes.addressof(program), 0, 0)
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    """One JSON object from stdin (`code`, `function`, `calls`, `cpu_s`); to stdout one JSON line a call, until a fault."""
    request: dict[str, Any] = json.load(sys.stdin)
    confine(request["cpu_s"])
    out, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
    out.write("confined\n")
    out.flush()
    names: dict[str, Any] = {"__name__": "answer"}
    exec(compile(request["code"], "answer", "exec"), names)
    for arguments in request["calls"]:
        out.write(json.dumps(names[request["function"]](*arguments)) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
