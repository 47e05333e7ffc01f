"""What one of two processes alone meets, both act upon: a loss that is not finite, and gradients that overflow in float16."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from two_processes import run_two

from chaccu.testing.tiny import build_model
from chaccu.train.recipe import DataSource, Recipe

# In step 2, process 1's loss is infinite while its gradient is not: nobody's weights may move.
_PROGRAM = """
import sys
from pathlib import Path
import torch
from chaccu.train.loop import run_steps
from chaccu.train.model import TrainableModel
from chaccu.train.pack import PackedRow
from chaccu.train.processes import end_process, joined
from chaccu.train.recipe import load_recipe

recipe = load_recipe(Path(sys.argv[1]))
rows = [PackedRow([7 + at, 8, 9, 11, 12 + at, 13], [0, 1, 1, 0, 1, 1], [3, 3]) for at in range(8)]
with joined(recipe) as processes:
    model = TrainableModel(recipe, processes.device, processes=processes)
    row_loss, calls = model.row_loss, iter(range(100))

    def fail(row):
        return row_loss(row) + (float("inf") if processes.rank == 1 and next(calls) == 1 else 0.0)

    model.row_loss = fail
    weights = []

    def look(step=None):
        local = [parameter.detach().to_local().clone() for parameter in model.parameters]
        weights.append((step.skipped if step else False, local))

    look()
    run_steps(model, rows, recipe, look)
    for (_, before), (skipped, after) in zip(weights, weights[1:]):
        print("skipped" if skipped else "taken", all(torch.equal(one, other) for one, other in zip(before, after)))
end_process()
"""


def print_lines(program: str, recipe: Recipe, folder: Path) -> list[list[str]]:
    """Lines that each of two processes prints."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(msgspec.to_builtins(recipe)))
    said = run_two([sys.executable, "-c", program, str(folder / "recipe.yaml")])
    return [out.decode().splitlines() for out in said]


def build_recipe(folder: Path, **fields: Any) -> Recipe:
    return Recipe(
        model=str(build_model(folder / "base", "llama")),
        data=[DataSource(path="none")],
        output=str(folder / "out"),
        method="full",
        learning_rate=1e-2,
        warmup_ratio=0.0,
        processes=2,
        **fields,
    )


@pytest.mark.slow
@pytest.mark.parametrize("in_backward", [False, True])
def test_one_process_loss_that_is_not_finite_keeps_the_weights_of_both(tmp_path: Path, in_backward: bool) -> None:
    recipe = build_recipe(tmp_path, optimizer="adamw_8bit", optimizer_in_backward=in_backward, precision="fp32")
    for lines in print_lines(_PROGRAM, recipe, tmp_path):
        assert lines == ["taken False", "skipped True", "taken False", "taken False"]


# The scale that fp16 begins with is made too large by far; both processes find the same one, and train.
_FP16 = _PROGRAM.replace('float("inf")', "0.0").replace(
    "    look()\n", "    from chaccu.train import step_guard\n    step_guard._FIRST_SCALE = 2.0**40\n    look()\n"
)


@pytest.mark.slow
def test_in_float16_two_processes_search_one_scale(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, precision="fp16", num_train_epochs=10)
    first, second = print_lines(_FP16, recipe, tmp_path)
    assert first == second
    assert first[0] == "skipped True"
    assert first[-1] == "taken False"
