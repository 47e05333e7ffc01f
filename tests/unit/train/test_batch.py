"""A step's size is one thing, however it is divided into rows and over processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.errors import RecipeError
from chaccu.train.batch import accumulation_steps, plan_steps
from chaccu.train.pack import PackedRow
from chaccu.train.recipe import Recipe, load_recipe, parse_recipe


def parse(**fields: Any) -> Recipe:
    return parse_recipe({"model": "base", "output": "out", "data": [{"path": "x"}], "sequence_len": 2048, **fields})


@pytest.mark.parametrize(
    ("processes", "row", "steps"),
    [(1, None, 64), (1, 16384, 8), (8, 16384, 1), (8, None, 8), (2, 4096, 16), (1, 131072, 1)],
)
def test_the_same_batch_on_any_number_of_processes(processes: int, row: int | None, steps: int) -> None:
    recipe = parse(global_batch_size=64, processes=processes, micro_batch_tokens=row)
    assert recipe.gradient_accumulation_steps == steps
    assert recipe.row_len * recipe.gradient_accumulation_steps * processes == 64 * 2048


def test_without_a_global_batch_each_process_accumulates_what_is_said() -> None:
    recipe = parse(gradient_accumulation_steps=3, processes=4)
    assert accumulation_steps(recipe, 4) == 3


@pytest.mark.parametrize(
    ("size", "near"),
    [(64, "=48 or 72,"), (23, "=24,"), (49, "=48 or 72,")],
)
def test_what_does_not_divide_names_the_nearest_that_does(size: int, near: str) -> None:
    fields = {"global_batch_size": size, "processes": 3, "micro_batch_tokens": 16384}
    with pytest.raises(RecipeError, match=rf"global_batch_size {size} is [\d,]+ tokens.*49,152 at once") as caught:
        parse(**fields)
    assert near in caught.value.remedy
    for nearest in near.strip("=,").split(" or "):
        assert parse(**{**fields, "global_batch_size": int(nearest)}).gradient_accumulation_steps == int(nearest) // 24


def test_rows_that_are_no_whole_number_of_sequences_can_still_make_a_step() -> None:
    # One row of 3,072 tokens is one sequence and a half; two are three.
    assert parse(global_batch_size=3, micro_batch_tokens=3072).gradient_accumulation_steps == 2


def test_both_keys_must_agree() -> None:
    assert parse(global_batch_size=8, gradient_accumulation_steps=8).gradient_accumulation_steps == 8
    with pytest.raises(RecipeError, match="gradient_accumulation_steps is 4, and global_batch_size 8 comes to 8") as caught:
        parse(global_batch_size=8, gradient_accumulation_steps=4)
    assert "leave one" in caught.value.remedy


def test_an_override_of_the_processes_keeps_the_step(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{model: base, output: out, data: [{path: x}], sequence_len: 64, global_batch_size: 16, processes: 8}")
    assert load_recipe(path).gradient_accumulation_steps == 2
    assert load_recipe(path, ["processes=1"]).gradient_accumulation_steps == 16


def test_each_epoch_takes_every_row_once_and_in_an_order_of_its_own() -> None:
    rows = [PackedRow([number], [1], [1]) for number in range(18)]
    recipe = parse(num_train_epochs=3, gradient_accumulation_steps=4)
    steps = plan_steps(rows, recipe, 1)
    assert len(steps) == 15
    epochs = [steps[start : start + 5] for start in (0, 5, 10)]
    assert [row for step in epochs[0] for row in step] == rows
    assert all(sorted(epoch, key=rows_of) == epochs[0] for epoch in epochs)
    assert len({str(list(map(rows_of, epoch))) for epoch in epochs}) == 3
    assert plan_steps(rows, recipe, 1) == steps
    # The same steps of two processes.
    assert plan_steps(rows, msgspec.structs.replace(recipe, gradient_accumulation_steps=2), 2) == steps
    assert plan_steps(rows, msgspec.structs.replace(recipe, max_steps=7), 1) == steps[:7]


def rows_of(step: Sequence[PackedRow]) -> list[int]:
    return [row.ids_T[0] for row in step]
