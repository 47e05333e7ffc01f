"""The optimizer and its learning-rate schedule, driven by the share of the run that is done.

Clipping: the gradients of a step are scaled so that their norm over all weights is at most `max_grad_norm` (Pascanu et al.
2013, arXiv:1211.5063). With `optimizer_in_backward` there is no moment at which all gradients are known: there each weight
tensor's gradient of the step is scaled by what is known of that norm when it comes (see `tensorwise`). The norm that is
reported is the one over all weights before.

A loss or a norm that is not finite updates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from chaccu.train import adafactor, bfloat16_moments, quantised_moments
from chaccu.train.adam import BETAS, EPSILON
from chaccu.train.memory import ADAFACTOR_UPDATE_BYTES, MOMENT_BYTES
from chaccu.train.recipe import Recipe
from chaccu.train.rounding import BLOCK
from chaccu.train.shards import local, whole
from chaccu.train.tensorwise import TensorwiseOptimizer, UpdateRule

_RULES = {
    "adamw_8bit": UpdateRule(quantised_moments.new_moments, quantised_moments.step_parameter),
    "adamw_bf16_sr": UpdateRule(bfloat16_moments.new_moments, bfloat16_moments.step_parameter),
    "adafactor": UpdateRule(adafactor.new_factors, adafactor.step_parameter, elementwise=False),
}


class StepOptimizer(Protocol):
    """What the loop needs: set the rate, run the backward passes of a step, then finish it."""

    def set_rate(self, rate: float) -> None: ...

    def begin_backward(self, *, last: bool) -> None:
        """A backward pass follows: of several in a step, or (`last`) the one that completes the step's gradients."""
        ...

    def watch(self, loss: torch.Tensor) -> None:
        """Take note of a loss, a scalar on the device, before its backward pass."""
        ...

    def clip(self) -> torch.Tensor:
        """Clip the step's gradients; their norm over all weights before, a float32 scalar on the device."""
        ...

    def finish_step(self) -> None:
        """Update what is not updated yet, and forget the gradients."""
        ...

    def skip_step(self) -> None:
        """In place of `finish_step`: forget the gradients, and leave weights and moments as they are."""
        ...

    def close(self) -> None:
        """Leave the weights alone from here on: a later run of the same model has an optimizer of its own."""
        ...


def build_optimizer(parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> StepOptimizer:
    """The recipe's optimizer; AdamW is Loshchilov & Hutter 2019 (arXiv:1711.05101). Matrices decay, vectors do not."""
    if recipe.optimizer == "adamw":
        return _AdamW(parameters, recipe)
    return TensorwiseOptimizer(parameters, recipe, _RULES[recipe.optimizer])


def optimizer_bytes(recipe: Recipe, parameters: Sequence[torch.Tensor]) -> int:
    """Memory on this process that the recipe's optimizer takes for `parameters`: what it keeps, and what it needs at once while
    it updates.

    Gradients are counted only where the optimizer itself keeps them from one backward pass to the next.
    """
    count = sum(local(one).numel() for one in parameters)
    kept = MOMENT_BYTES[recipe.optimizer]
    if recipe.optimizer_in_backward and recipe.gradient_accumulation_steps > 1:
        # With a scale of 4 bytes for each block.
        kept += 1 + 4 / BLOCK
    largest = max((one.numel() for one in parameters), default=0)
    return int(kept * count) + (ADAFACTOR_UPDATE_BYTES * largest if recipe.optimizer == "adafactor" else 0)


class _AdamW:
    def __init__(self, parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> None:
        self._parameters = list(parameters)
        self._limit = recipe.max_grad_norm
        groups = [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        # On a GPU in one pass over memory, and without a copy of all weights beside.
        fused = all(one.is_cuda for one in parameters)
        self.inner = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=recipe.learning_rate, betas=BETAS, eps=EPSILON, fused=fused
        )

    def set_rate(self, rate: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = rate

    def begin_backward(self, *, last: bool) -> None:
        pass

    def watch(self, loss: torch.Tensor) -> None:
        pass

    def clip(self) -> torch.Tensor:
        return whole(torch.nn.utils.clip_grad_norm_(self._parameters, self._limit))

    def finish_step(self) -> None:
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)

    def skip_step(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def close(self) -> None:
        pass


def learning_rate_at(recipe: Recipe, progress: float) -> float:
    """The learning rate when `progress` (0 to 1) of the run is done: linear warm-up, then the recipe's decay to 0."""
    if recipe.warmup_ratio > 0 and progress < recipe.warmup_ratio:
        return recipe.learning_rate * progress / recipe.warmup_ratio
    if recipe.lr_scheduler == "constant":
        return recipe.learning_rate
    done = (progress - recipe.warmup_ratio) / (1 - recipe.warmup_ratio)
    if recipe.lr_scheduler == "linear":
        return recipe.learning_rate * (1 - done)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
