"""The optimizer and its learning-rate schedule, driven by the share of the run that is done."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from chaccu.train.recipe import Recipe


def build_optimizer(parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); matrices decay, vectors do not."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=recipe.learning_rate)


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
