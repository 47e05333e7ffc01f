"""The optimizer and its learning-rate schedule, driven by the share of the run that is done.

Clipping: the gradients of a step are scaled so that their norm over all weights is at most `max_grad_norm` (Pascanu et al.
2013, arXiv:1211.5063). With `optimizer_in_backward` there is no moment at which all gradients are known: there the gradient of
each weight tensor is scaled by itself to that norm, and the norm that is reported is the one over all before.

A loss or a norm that is not finite updates nothing. In the backward pass this is decided on the device, since to look would
wait for it: what comes before the first such gradient is updated, the rest of the step is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from chaccu.train.quantised_moments import Moments, Rates, new_moments, step_parameter
from chaccu.train.recipe import Recipe
from chaccu.train.shards import local, total_norm, whole

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class StepOptimizer(Protocol):
    """What the loop needs: set the rate, run the backward passes of a step, then finish it."""

    def set_rate(self, rate: float) -> None: ...

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


def build_optimizer(parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> StepOptimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) as the recipe wants it; matrices decay, vectors do not."""
    if recipe.optimizer == "adamw":
        return _AdamW(parameters, recipe)
    return _AdamW8bit(parameters, recipe)


class _AdamW:
    def __init__(self, parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> None:
        self._parameters = list(parameters)
        self._limit = recipe.max_grad_norm
        groups = [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=recipe.learning_rate, betas=_BETAS, eps=_EPSILON
        )

    def set_rate(self, rate: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = rate

    def watch(self, loss: torch.Tensor) -> None:
        pass

    def clip(self) -> torch.Tensor:
        return whole(torch.nn.utils.clip_grad_norm_(self._parameters, self._limit))

    def finish_step(self) -> None:
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)

    def skip_step(self) -> None:
        self.inner.zero_grad(set_to_none=True)


class _AdamW8bit:
    """See `quantised_moments`. With `optimizer_in_backward`, a weight is updated by a hook as soon as its gradient is there."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> None:
        self._recipe = recipe
        self._moments: list[tuple[torch.nn.Parameter, Moments]] = [(one, new_moments(local(one))) for one in parameters]
        self._rate = recipe.learning_rate
        self._step = 1
        self._scale: torch.Tensor | None = None
        self._norms: list[torch.Tensor] = []
        # 0 times what was finite is 0, and NaN for the rest of the step when something was not.
        self._nothing: torch.Tensor | float = 0.0
        if recipe.optimizer_in_backward:
            for number, (parameter, _) in enumerate(self._moments):
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, number=number: self._update_now(number)
                )

    def set_rate(self, rate: float) -> None:
        self._rate = rate

    def watch(self, loss: torch.Tensor) -> None:
        self._nothing = self._nothing + 0.0 * loss

    def clip(self) -> torch.Tensor:
        if self._norms:
            norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(self._norms))
        else:
            norm = total_norm([one.grad for one, _ in self._moments if one.grad is not None])
        self._scale = self._scale_for(norm)
        return norm

    def finish_step(self) -> None:
        for number, (parameter, _) in enumerate(self._moments):
            if parameter.grad is not None:
                scale = self._scale if self._scale is not None else torch.ones((), device=parameter.device)
                self._update(number, parameter.grad, scale)
        self._step += 1
        self._forget()

    def skip_step(self) -> None:
        if self._recipe.optimizer_in_backward:
            # Some weights may have taken this step; to count it for the others makes their next one smaller, never larger.
            self._step += 1
        for parameter, _ in self._moments:
            parameter.grad = None
        self._forget()

    def _forget(self) -> None:
        self._scale, self._nothing = None, 0.0
        self._norms = []

    def _update_now(self, number: int) -> None:
        gradient = self._moments[number][0].grad
        if gradient is not None:
            norm = whole(torch.linalg.vector_norm(gradient, dtype=torch.float32))
            self._norms.append(norm)
            self.watch(norm)
            self._update(number, gradient, self._scale_for(norm))

    @torch.no_grad()
    def _update(self, number: int, gradient: torch.Tensor, scale: torch.Tensor) -> None:
        parameter, moments = self._moments[number]
        decay = self._recipe.weight_decay if parameter.ndim > 1 else 0.0
        rates = Rates(self._rate, *_BETAS, _EPSILON, decay, self._step)
        seed = hash((self._recipe.seed, self._step, number)) & 0x7FFFFFFF
        step_parameter(local(parameter.data), local(gradient), moments, rates, seed, scale)
        parameter.grad = None

    def _scale_for(self, norm: torch.Tensor) -> torch.Tensor:
        scale = (self._recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return scale + self._nothing + 0.0 * norm


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
