"""`judge_on_ray`: chunks judged by the nodes of a Ray cluster; reading, the indexes and writing stay in this process.

Invariants: results are those of `judge_chunks`, in its order; a node whose Chaccu, libraries, configuration files or
tokenizer differ from this machine's is refused by name, so the output cannot depend on where a chunk went. At most
`_MOST_IN_FLIGHT` chunks are on the cluster at a time, so memory here does not grow with the input. A cluster that was
started here listens on loopback only and ends with this process (after a kill, Ray's idle agents take up to a minute); one
that was there already stays.
Ignored: sources are read here, so nodes need not see them.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import msgspec

from chaccu.artifact import library_versions
from chaccu.data.clean import LIBRARIES, tokenizer_sha256_of
from chaccu.data.config import CleanConfig
from chaccu.data.judging import Chunk, Judged, Judgement, Judging, judge_chunk, pass_in_order
from chaccu.errors import ChaccuError, DataError, MissingDependencyError, UsageError

ADDRESS_VARIABLE = "RAY_ADDRESS"
_LOCAL = ("", "local")
_ANY_RUNNING = "auto"
_REACH_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 60.0
# One process reads and writes: what it can feed is done by far fewer CPUs than this.
_MOST_IN_FLIGHT = 256
# For the window's chunks and their results; what is over it goes to disk.
_LOCAL_STORE_BYTES = 512 << 20
# Read when Ray is imported, and by the processes that it starts: it tells nobody of its use, and takes the loopback
# address for its node's, as it does by itself where it knows no clusters.
_LOCAL_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_ASK_STATUS = "`ray status` on the head node tells how the cluster is; its log folder is /tmp/ray/session_latest/logs"
_GIVE_TOKEN = (
    "the cluster asks for its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what ~/.ray/auth_token holds there"
)
_SAME_EVERYWHERE = "install the same versions on every node, best from one image"


class _Order(msgspec.Struct, frozen=True):
    """What a node needs besides its chunks, and what must be the same there: `settings` is the manifest's view of the
    configuration, with the hashes of the files that it names; `config` is pickled."""

    versions: dict[str, str]
    settings: bytes
    config: bytes


def judge_on_ray(workers: int, address: str | None = None) -> Judging:
    """A place for `clean_conversations` to judge in: the cluster at `address` (HOST:PORT of its head, or "auto" for one that
    runs on this machine), else at `RAY_ADDRESS`, else one of `workers` CPUs that is started for the run.

    A process that is connected to Ray already goes on with that connection. Raises `MissingDependencyError` without Ray,
    `UsageError` for what is no address, `DataError` when nothing answers there within 10 seconds or is no cluster that this
    machine belongs to within 60.
    """
    if find_spec("ray") is None:
        raise MissingDependencyError("ray", extra="ray", needed_for="--on ray")
    address = os.environ.get(ADDRESS_VARIABLE, "") if address is None else address
    if address not in _LOCAL:
        if address != _ANY_RUNNING:
            _check_reachable(address)
        _check_connection(address)

    def judge(config: CleanConfig, chunks: Iterable[Chunk]) -> Judged:
        order = msgspec.msgpack.encode(_order_of(config))
        with _connect(address, workers) as cpus:
            import ray

            # Judging has no side effect: what a lost node was at is done again elsewhere.
            task = ray.remote(num_cpus=1, max_retries=3)(_judge_there)
            yield from pass_in_order(
                chunks,
                submit=lambda chunk: task.remote(order, chunk),
                collect=_collect,
                most=min(2 * cpus, _MOST_IN_FLIGHT),
            )

    return judge


def _check_reachable(address: str) -> None:
    """Fail at once where nothing listens: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise UsageError(
            f"{address!r} is no address of a Ray cluster.",
            remedy="give HOST:PORT of its head node, such as 10.0.0.1:6379, on a machine that has joined the cluster",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise DataError(
            f"no Ray cluster answers at {address} within {_REACH_TIMEOUT_S:.0f} s: {error}.",
            remedy="check the address and that the head runs; without --ray-address and RAY_ADDRESS one is started here",
        ) from error


def _check_connection(address: str) -> None:
    """Connect in a process of its own: Ray cannot be told how long to try, nor be interrupted while it does."""
    probe = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe, address], capture_output=True, text=True, timeout=_CONNECT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{address} gave no connection to Ray within {_CONNECT_TIMEOUT_S:.0f} s.",
            remedy="give the address that `ray start` named, on a machine that has joined that cluster",
        ) from error
    if done.returncode:
        told = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        remedy = _GIVE_TOKEN if "Unauthenticated" in done.stderr else _ASK_STATUS
        raise DataError(f"Ray at {address} cannot be used: {told[-1] if told else 'it gave no reason'}", remedy=remedy)


@contextmanager
def _connect(address: str, workers: int) -> Iterator[int]:
    """A connection to Ray as long as the context lasts; gives the number of CPUs that it found."""
    if address in _LOCAL:
        os.environ.update(_LOCAL_ENVIRONMENT)
    import ray

    if ray.is_initialized():
        yield _count_cpus()
        return
    local: dict[str, Any] = {
        "address": "local",
        "num_cpus": workers,
        "num_gpus": 0,
        "include_dashboard": False,
        "object_store_memory": _LOCAL_STORE_BYTES,
    }
    try:
        _begin(local if address in _LOCAL else {"address": address})
        yield _count_cpus()
    finally:
        ray.shutdown()


def _begin(options: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise DataError(f"Ray cannot be used: {_first_line(error)}", remedy=_ASK_STATUS) from error


def _count_cpus() -> int:
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < 1:
        raise DataError("the Ray cluster has no CPU.", remedy="let a node with CPUs join it first")
    return cpus


def _collect(pending: Any) -> list[Judgement]:
    """A task's result. A failure of Ray's own, after its retries, is an error of the run."""
    import ray

    try:
        judgements: list[Judgement] = ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ChaccuError):
            raise error.cause from error
        if isinstance(error.cause, ray.exceptions.RayError):
            # What the node could not even begin, most often because Chaccu is not installed there.
            raise DataError(f"a node cannot judge: {_first_line(error.cause)}.", remedy=_SAME_EVERYWHERE) from error
        raise
    except ray.exceptions.RayError as error:
        raise DataError(f"Ray lost a task for good: {_first_line(error)}", remedy=_ASK_STATUS) from error
    return judgements


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _order_of(config: CleanConfig) -> _Order:
    return _Order(library_versions(*LIBRARIES), _describe(config), pickle.dumps(config))


def _describe(config: CleanConfig) -> bytes:
    return msgspec.json.encode([config.settings(), tokenizer_sha256_of(config)])


def _judge_there(order: bytes, chunk: Chunk) -> list[Judgement]:
    """On a node: judge a chunk, if all that it depends on is what it is on the machine that asks."""
    try:
        return judge_chunk(_open_order(order), chunk)
    except ChaccuError as error:
        # Of one kind whatever it was: not every error survives pickling, and the node must be named.
        raise DataError(f"on node {socket.gethostname()}: {error.message}", remedy=error.remedy) from None


@lru_cache(maxsize=2)
def _open_order(encoded: bytes) -> CleanConfig:
    """The configuration, checked once a process."""
    order = msgspec.msgpack.decode(encoded, type=_Order)
    there = library_versions(*order.versions)
    for name, version in order.versions.items():
        if there.get(name) != version:
            raise DataError(
                f"{name} is {there.get(name, 'not installed')} there and {version} here, so the output could differ.",
                remedy=_SAME_EVERYWHERE,
            )
    config: CleanConfig = pickle.loads(order.config)
    if _describe(config) != order.settings:
        raise DataError(
            "a word list, question file or tokenizer that the configuration names is another one there.",
            remedy="put the same files under the same absolute paths on every node",
        )
    return config
