"""One training run over rows made by hand, and what it was; as a script, runs of the processes that a launcher has started.

python trajectory.py CASES.json OUTCOMES      under RANK, WORLD_SIZE and their like; process 0 writes
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch

from chaccu.conversation import Encoded
from chaccu.train.loop import evaluate, run_steps
from chaccu.train.model import TrainableModel
from chaccu.train.pack import PackedRow, pack_rows
from chaccu.train.processes import ALONE, Processes, end_process, joined
from chaccu.train.recipe import DataSource, Recipe

# Groups of conversations: with four a step, the last step of an epoch has three, which two processes cannot share evenly.
GROUPS, LENGTHS, ROW = 7, (23, 5, 17, 9), 64


class Case(msgspec.Struct, frozen=True):
    """`rows`: of how many conversations' groups a row is made; `fields`: of the recipe."""

    name: str
    model: str
    rows: int = 1
    fields: dict[str, Any] = {}


class Outcome(msgspec.Struct, frozen=True):
    losses: list[float]
    norms: list[float]
    before: float
    after: float
    weights: dict[str, Any]


def build_rows(groups: int) -> list[PackedRow]:
    """All groups, in rows of so many each."""
    draw = random.Random(5)
    packed = []
    for _ in range(GROUPS):
        conversations = [
            Encoded([draw.randrange(300) for _ in range(size)], [0, 1, *(draw.randint(0, 1) for _ in range(size - 2))], ())
            for size in LENGTHS
        ]
        packed.append(pack_rows(conversations, ROW, seed=0)[0])
    return [_join(packed[start : start + groups]) for start in range(0, GROUPS, groups)]


def _join(rows: list[PackedRow]) -> PackedRow:
    return PackedRow(
        [token for row in rows for token in row.ids_T],
        [bit for row in rows for bit in row.mask_T],
        [length for row in rows for length in row.lengths],
    )


def run_case(case: Case, processes: Processes = ALONE) -> Outcome:
    recipe = build_recipe(case, processes.count)
    model = TrainableModel(recipe, processes.device, processes=processes)
    rows = build_rows(case.rows)
    before = evaluate(model, rows)
    log = run_steps(model, rows, recipe)
    after = evaluate(model, rows)
    assert before is not None
    assert after is not None
    gathered = model.gather_weights()
    named = model.full.state_dict() if gathered is None else gathered
    weights = {name: value.detach().cpu() for name, value in named.items()}
    return Outcome([step.loss for step in log], [step.grad_norm for step in log], before, after, weights)


def build_recipe(case: Case, processes: int) -> Recipe:
    fields = {
        "method": "full",
        "precision": "fp32",
        "learning_rate": 1e-3,
        "max_grad_norm": 0.5,
        "num_train_epochs": 2,
        "weight_decay": 0.01,
        "sequence_len": ROW,
        "micro_batch_tokens": ROW * case.rows,
        "processes": processes,
        **case.fields,
    }
    return msgspec.convert({"model": case.model, "data": [DataSource(path="none")], "output": "none", **fields}, Recipe)


def main() -> None:
    cases = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[Case])
    with joined(build_recipe(cases[0], 2)) as processes:
        outcomes = {case.name: msgspec.to_builtins(run_case(case, processes), builtin_types=(torch.Tensor,)) for case in cases}
    if processes.first:
        torch.save(outcomes, sys.argv[2])
    end_process()


if __name__ == "__main__":
    main()
