"""Worker processes that encode conversations, one a core: Python renders and joins on one core only.

They are started as programs of their own and spoken to over their standard streams, not by `multiprocessing`, which would run
the calling program's main module anew in each of them: a worker imports neither that nor torch, and a script needs no guard.

Invariants: results come in the order of the chunks; a few chunks a worker are in flight, no more; an error of a worker is
raised here as it was there. Workers leave Ctrl-C to this process and end with it, even when it is killed, since their input
ends then.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING

from chaccu.errors import ChaccuError, TrainError

if TYPE_CHECKING:
    from chaccu.train.encode import Chunk, Encoding

Encoded = list[tuple[bytes, bytes]]

_MOST_WORKERS = 16
# Text that one core encodes in the second that a worker takes to start, with a tokenizer of 262,144 tokens.
_BYTES_A_WORKER = 5_000_000
_CHUNKS_A_WORKER = 3


def choose_workers(text_bytes: int) -> int:
    """Processes that so much text is worth on this machine's cores; 1 is none but this."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _MOST_WORKERS, text_bytes // _BYTES_A_WORKER))


@contextlib.contextmanager
def encoding_in(workers: int, encoding: Encoding) -> Iterator[Callable[[Iterable[Chunk]], Generator[Encoded]]]:
    """A function that encodes chunks in order: in this process, or in `workers` others, which live as long as the block.

    It raises what `encode_chunk` raises, and `TrainError` when a worker is ended from outside.
    """
    if workers <= 1:
        yield lambda chunks: (encoding.encode_chunk(chunk) for chunk in chunks)
        return
    pool = _Pool(workers, encoding)
    try:
        yield pool.encode
    finally:
        pool.close()


class _Pool:
    """Workers, and a thread for each that speaks to whichever is free."""

    def __init__(self, workers: int, encoding: Encoding) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        # Once, not once a worker: it holds the whole vocabulary.
        self._encoding = pickle.dumps(encoding)
        self._told: set[int] = set()
        try:
            for _ in range(workers):
                self._processes.append(_start_worker())
                self._free.put(self._processes[-1])
        except BaseException:
            self.close()
            raise

    def encode(self, chunks: Iterable[Chunk]) -> Generator[Encoded]:
        in_flight: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            in_flight.append(self._threads.submit(self._ask, chunk))
            if len(in_flight) > _CHUNKS_A_WORKER * len(self._processes):
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                # What was not yet sent to it stays unsent.
                with contextlib.suppress(BrokenPipeError):
                    stream.close() if stream is not None else None

    def _ask(self, chunk: Chunk) -> Encoded:
        process = self._free.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.pid not in self._told:
                process.stdin.write(self._encoding)
                self._told.add(process.pid)
            pickle.dump(chunk, process.stdin)
            process.stdin.flush()
            answer: Encoded | ChaccuError = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise TrainError(
                f"a process that encodes conversations ended early, with exit code {process.wait()}.",
                remedy="run it again; where it was killed for want of memory, with less running beside it",
            ) from error
        finally:
            self._free.put(process)
        if isinstance(answer, ChaccuError):
            raise answer
        return answer


def _start_worker() -> subprocess.Popen[bytes]:
    # The modules that this process finds, wherever it looks for them.
    program = f"import sys; sys.path[:] = {sys.path!r}; from chaccu.train.encode_workers import serve; serve()"
    # The cores are shared out already: tokenizers would start a thread for each in every worker.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def serve() -> None:
    """A worker: the encoding from standard input, then chunks, whose tokens or error go to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What a library may print is not an answer.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with contextlib.suppress(EOFError, BrokenPipeError):
        encoding: Encoding = pickle.load(source)
        while True:
            chunk = pickle.load(source)
            try:
                answer: Encoded | ChaccuError = encoding.encode_chunk(chunk)
            except ChaccuError as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
