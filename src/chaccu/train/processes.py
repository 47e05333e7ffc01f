"""The processes of a run, one a GPU: who they are, how they share a step's rows, and what they have to agree on.

They are started by PyTorch's elastic launcher (`launch`, or torchrun on one or several machines), which tells each its place in
the environment. All read the same data and pack the same rows, so no row is sent; each takes its share of every step.

Invariants: every process does the same number of forward and backward passes, since each of those is a meeting of all; what
decides how a run goes on (time, an output that is there) is decided by process 0. Alone, nothing here costs anything.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import islice
from typing import NoReturn, TypeVar

import msgspec
import torch
import torch.distributed

from chaccu.errors import RecipeError, TrainError
from chaccu.train.batch import accumulation_steps
from chaccu.train.pack import PackedRow
from chaccu.train.recipe import Recipe, find_single_gpu_recipe

_Result = TypeVar("_Result")
# The longest that one process may keep the others waiting, by loading or writing a large model on a slow disk.
_PATIENCE = datetime.timedelta(hours=1)


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """This process, `rank`, among the `count` of the run, and `local_rank` among the `local_count` on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks and writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """What this process computes on."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda") if self.count == 1 else torch.device("cuda", self.local_rank)

    def share(self, rows: Sequence[PackedRow]) -> list[PackedRow]:
        """This process's part of `rows`: as many as every other has, made up with a row that does not count."""
        if self.count == 1:
            return list(rows)
        share = list(rows[self.rank :: self.count])
        room = math.ceil(len(rows) / self.count) - len(share)
        return share + [msgspec.structs.replace(row, counts=False) for row in list(rows[:1]) * room]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' `value`, on its device."""
        if self.count > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def least(self, value: int) -> int:
        """The least of all processes' `value`."""
        if self.count == 1:
            return value
        box = torch.tensor(value)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MIN)
        return int(box)

    def decide(self, make: Callable[[], _Result]) -> _Result:
        """What `make` returns in process 0, in all of them."""
        if self.count == 1:
            return make()
        box = [make() if self.first else None]
        torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def relay(self, make: Callable[[], Generator[_Result]]) -> Generator[_Result]:
        """What `make` yields in process 0, one after another, in all of them: the others do not make it."""
        if self.count == 1:
            yield from make()
            return
        made = make() if self.first else None
        try:
            while box := self.decide(lambda: list(islice(made or (), 1))):
                yield box[0]
        finally:
            if made is not None:
                made.close()

    def shared(self, clock: Callable[[], float]) -> Callable[[], float]:
        """Process 0's `clock`, for all that ask it at the same points."""
        return clock if self.count == 1 else lambda: self.decide(clock)

    def wait(self) -> None:
        """Until all have come here."""
        self.sum(torch.zeros(()))

    @contextlib.contextmanager
    def in_turns(self, at_once: int) -> Iterator[None]:
        """Run the block in `at_once` processes of this machine at a time, so that they need no more of its memory."""
        turn, turns = self.local_rank // at_once, math.ceil(self.local_count / at_once)
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(turn, turns):
            self.wait()


ALONE = Processes()


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process and told it its place."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys()


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its run, which alone shows and prints."""
    return not launched(environment) or environment["RANK"] == "0"


def find_place(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Processes:
    """This process's place, as the launcher tells it. Raises `RecipeError` when it is not what the recipe says."""
    if not launched(environment):
        if recipe.processes > 1:
            raise RecipeError(
                f"processes is {recipe.processes}, and this process was started alone.",
                remedy=f"chaccu train starts them, and so does torchrun --nproc-per-node {recipe.processes} -m chaccu.cli.main",
            )
        return ALONE
    count = int(environment["WORLD_SIZE"])
    if count != recipe.processes:
        raise RecipeError(
            f"the launcher started {count} process{'es' if count > 1 else ''} (WORLD_SIZE), and the recipe's processes is "
            f"{recipe.processes}.",
            remedy=f"processes={count}, or start {recipe.processes}",
        )
    return Processes(
        rank=int(environment["RANK"]),
        count=count,
        local_rank=int(environment["LOCAL_RANK"]),
        local_count=int(environment.get("LOCAL_WORLD_SIZE", count)),
    )


def check_processes(recipe: Recipe) -> None:
    """Raise `RecipeError` for more processes than this machine has GPUs, unless a launcher spreads them over several machines.

    Without GPUs any number shares the processor. The remedy is the same step on the GPUs that there are.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus or recipe.processes <= gpus or launched():
        return
    rows = accumulation_steps(recipe, recipe.processes) * recipe.processes
    fit = max(count for count in range(1, gpus + 1) if rows % count == 0)
    same = f"processes={fit} gradient_accumulation_steps={rows // fit} takes the same steps"
    if recipe.global_batch_size is not None:
        same = (
            f"processes={fit} takes the same steps: global_batch_size stays, gradient_accumulation_steps becomes {rows // fit}"
        )
    shipped = find_single_gpu_recipe(recipe)
    raise RecipeError(
        f"processes is {recipe.processes}, one a GPU, and this machine has {gpus} GPU{'s' if gpus > 1 else ''}.",
        remedy=same + (f"; the recipe {shipped} is made for one GPU" if shipped else ""),
    )


@contextlib.contextmanager
def joined(recipe: Recipe) -> Iterator[Processes]:
    """Meet the run's other processes, for as long as the block runs. Raises `RecipeError` or `TrainError`."""
    place = find_place(recipe)
    if place.count == 1:
        yield place
        return
    on_gpu = place.device.type == "cuda"
    if on_gpu:
        if place.local_count > torch.cuda.device_count():
            raise TrainError(
                f"{place.local_count} processes were started on this machine, which has {torch.cuda.device_count()} GPUs.",
                remedy="start one a GPU",
            )
        torch.cuda.set_device(place.device)
    # Objects and times travel by gloo, without waiting for what the GPU still does.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    yield place
    # Not after an error: others may be waiting in the middle of something, and the launcher ends them.
    torch.distributed.destroy_process_group()


def end_process() -> NoReturn:
    """End this process of several now that its work is done and written, with exit code 0 and without Python's own end.

    PyTorch keeps the process group of a sharded model for good, with gloo's threads. One of them that is late in letting go of
    its last message wants the interpreter while that ends, and the whole process is then aborted (pytorch/pytorch#179291).
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
