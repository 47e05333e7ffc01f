"""How large a step is: rows, accumulation and processes, from what the recipe says; and which rows each step takes.

Invariants: a step takes as many tokens however many processes share them, when `global_batch_size` is given; in an epoch every
row is taken once. This module is free of torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING

import msgspec

from chaccu.errors import RecipeError

if TYPE_CHECKING:
    from chaccu.train.pack import PackedRow
    from chaccu.train.recipe import Recipe


def accumulation_steps(recipe: Recipe, processes: int) -> int:
    """Rows that each of `processes` takes one after another in a step.

    With `global_batch_size` these are what makes a step of so many sequences of `sequence_len` tokens; without it, the recipe's
    `gradient_accumulation_steps`. Raises `RecipeError` with the nearest sizes that can be had when it does not divide evenly.
    """
    if recipe.global_batch_size is None:
        return recipe.gradient_accumulation_steps
    tokens = recipe.global_batch_size * recipe.sequence_len
    at_once = recipe.row_len * processes
    if tokens % at_once:
        unit = at_once // gcd(at_once, recipe.sequence_len)
        below = recipe.global_batch_size // unit * unit
        near = " or ".join(str(size) for size in (below, below + unit) if size)
        raise RecipeError(
            f"global_batch_size {recipe.global_batch_size} is {tokens:,} tokens a step ({recipe.sequence_len:,} a sequence), "
            f"which rows of {recipe.row_len:,} tokens on {processes} process{'es' if processes > 1 else ''} ({at_once:,} at "
            "once) do not divide.",
            remedy=f"global_batch_size={near}, or another micro_batch_tokens",
        )
    return tokens // at_once


def resolve_accumulation(recipe: Recipe, *, given: bool) -> Recipe:
    """`recipe` with the `gradient_accumulation_steps` that its `global_batch_size` comes to.

    `given`: whether the recipe names the former too. Raises `RecipeError` when the two do not agree.
    """
    steps = accumulation_steps(recipe, recipe.processes)
    if given and steps != recipe.gradient_accumulation_steps:
        raise RecipeError(
            f"gradient_accumulation_steps is {recipe.gradient_accumulation_steps}, and global_batch_size "
            f"{recipe.global_batch_size} comes to {steps} (rows of {recipe.row_len:,} tokens, processes: {recipe.processes}).",
            remedy="leave one of the two out",
        )
    return msgspec.structs.replace(recipe, gradient_accumulation_steps=steps)


def plan_steps(rows: Sequence[PackedRow], recipe: Recipe, processes: int) -> list[Sequence[PackedRow]]:
    """The rows of each step of a run, all processes' together: epoch after epoch, at most `max_steps`.

    The first epoch takes the rows as they come, the last of its steps what is left; each later epoch takes the same steps in an
    order of its own, which follows from the seed. So a step is the same however it is cut into rows, in every epoch.
    """
    size = accumulation_steps(recipe, processes) * processes
    epoch = [rows[start : start + size] for start in range(0, len(rows), size)]
    steps: list[Sequence[PackedRow]] = []
    for number in range(recipe.num_train_epochs):
        if recipe.max_steps is not None and len(steps) >= recipe.max_steps:
            break
        steps += random.Random(f"{recipe.seed} {number}").sample(epoch, len(epoch)) if number else epoch
    return steps[: recipe.max_steps]
