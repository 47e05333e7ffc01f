"""Start a command in several processes of this machine, through PyTorch's elastic launcher, and say what became of them.

Each process is the same command again, with its place in its environment; torchrun starts it likewise, on several machines too.

Invariants: when one process fails the others are ended; when this one is ended, by whatever signal, so are they; the error that
is raised names the process that failed first and why. A process that was started here says so to this one alone: of many that
fail for one reason, one message is read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from chaccu.errors import ChaccuError, TrainError

# The process id of the launching command, in the environment of those that it started.
_LAUNCHER = "CHACCU_LAUNCHER"
# Where the elastic launcher looks for why a process failed.
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_WATCH_S = 0.5


class Failure(msgspec.Struct, kw_only=True):
    """Why a process ended: its own word where it left one (`message`; `known` when it is a `ChaccuError`, with `remedy` and
    `exit_code`), else the `signal` that ended it."""

    rank: int = 0
    message: str = ""
    remedy: str = ""
    exit_code: int = 1
    known: bool = False
    signal: int = 0
    time_s: float = 0.0


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run `chaccu ARGUMENTS` in so many processes, and wait for all of them.

    Raises `TrainError` when one fails, `KeyboardInterrupt` on Ctrl-C, which all of them get.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="chaccu-") as folder, _set_environment(_child_environment(processes)), _no_logs():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "chaccu.cli.main", *arguments)
        except ChildFailedError as error:
            raise explain_failures([_read_failure(rank, one) for rank, one in error.failures.items()], processes) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None


@contextlib.contextmanager
def telling_launcher(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Leave word of an error in the block where the launcher looks for it; as a process of `launch`, say it nowhere else, and
    end when the launching command is gone."""
    launcher = environment.get(_LAUNCHER)
    if launcher is not None:
        threading.Thread(target=_end_with, args=(int(launcher),), daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if launcher is None:
            raise
        raise SystemExit(130) from None
    except Exception as error:
        if _ERROR_FILE in environment:
            _leave_word(Path(environment[_ERROR_FILE]), error)
        if launcher is None:
            raise
        raise SystemExit(getattr(error, "exit_code", 1)) from None


def explain_failures(failures: Sequence[Failure], processes: int) -> TrainError:
    """The error that all of them come to: a process's own error before one that was ended from outside, and that before those
    that only found the others gone."""

    def rank_cause(one: Failure) -> tuple[int, float]:
        ended = one.signal not in (0, signal.SIGTERM)
        return (0 if one.known else 1 if ended else 2 if one.message else 3), one.time_s

    first = min(failures, key=rank_cause)
    where = f"process {first.rank} of {processes}"
    if first.message:
        error = TrainError(f"{where}: {first.message}", remedy=first.remedy)
        error.exit_code = first.exit_code
        return error
    if first.signal:
        return TrainError(
            f"{where} was ended by {signal.Signals(first.signal).name}, and the others with it.",
            remedy="SIGKILL often comes from the system when memory runs out: see dmesg"
            if first.signal == signal.SIGKILL
            else "",
        )
    return TrainError(f"{where} ended with exit code {first.exit_code}, and the others with it.")


def _child_environment(processes: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    wanted = {
        # Else each would take all cores.
        "OMP_NUM_THREADS": str(threads),
        # One machine's processes need no network; its own name may lead nowhere.
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    return {**{key: value for key, value in wanted.items() if key not in os.environ}, _LAUNCHER: str(os.getpid())}


@contextlib.contextmanager
def _set_environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _no_logs() -> Iterator[None]:
    """The launcher logs each step of ending processes; what the user needs of it is in the error."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_WATCH_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _leave_word(file: Path, error: Exception) -> None:
    """In the form that torch.distributed.elastic reads: it prints the message in torchrun's own summary."""
    known = isinstance(error, ChaccuError)
    message = error.message if isinstance(error, ChaccuError) else "".join(traceback.format_exception(error)).rstrip()
    word = Failure(
        message=message,
        remedy=error.remedy if isinstance(error, ChaccuError) else "",
        exit_code=error.exit_code if isinstance(error, ChaccuError) else 1,
        known=known,
        time_s=time.time(),
    )
    text = {
        "message": str(error),
        "errorTraits": None,
        "extraInfo": {"py_callstack": message, "timestamp": str(int(word.time_s))},
    }
    file.write_bytes(msgspec.json.encode({"message": text, "chaccu": word}))


def _read_failure(rank: int, failure: Any) -> Failure:
    """What a `ProcessFailure` of the launcher says."""
    file = Path(failure.error_file)
    if file.is_file():
        word = msgspec.json.decode(file.read_bytes()).get("chaccu")
        if word is not None:
            return msgspec.structs.replace(msgspec.convert(word, Failure), rank=rank)
    ended_by = max(0, -int(failure.exitcode))
    return Failure(rank=rank, signal=ended_by, exit_code=1, time_s=float(failure.timestamp))
