"""Optimizers that update one weight tensor at a time, and so can do it in the backward pass: no gradients are then kept.

Which numbers an update comes to is an `UpdateRule`'s matter; here is when it happens, and what is clipped:

- After the backward passes (`optimizer_in_backward: false`): gradients are kept and summed by PyTorch, and clipped by their
  norm over all weights.
- In the backward pass: a hook updates a weight as soon as its gradient is there, and forgets the gradient. With accumulation
  that happens in the last backward pass of the step; before, the gradient is added to a sum in 8 bits (`held_gradients`), and
  the update takes the sum. Clipped is, tensor by tensor, the gradient of the whole step (the sum over all its backward passes),
  never that of a single pass. It is scaled by the norm over all weights as far as it is known by then (`running_norm`): no
  tensor's gradient is ever above `max_grad_norm`, and while norms change little from step to step, all are scaled as after the
  backward pass. The norm that is reported is the true one.

A loss or a norm that is not finite updates nothing. In the backward pass this is decided on the device, since to look would
wait for it: what comes before the first such gradient is updated, the rest of the step is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from chaccu.train.adam import BETAS, EPSILON, Rates
from chaccu.train.held_gradients import HeldGradient, hold_gradient, new_held_gradient, release_gradient
from chaccu.train.recipe import Recipe
from chaccu.train.running_norm import RunningNorm
from chaccu.train.shards import gathered, local, norm_of_parts, part_of


class UpdateRule(NamedTuple):
    """How a tensor is updated.

    `new_state(parameter)`: what is remembered of it. `step(parameter, gradient, state, rates, seed, scale)`: update parameter
    and state in place; `scale`, a float32 scalar on the device, multiplies the gradient, and NaN in it leaves all as it is.
    `elementwise`: whether a part of a tensor is updated as it would be within the whole. If not, tensors that are divided among
    processes are gathered for their update, which every process computes.
    """

    new_state: Callable[[torch.Tensor], Any]
    step: Callable[[torch.Tensor, torch.Tensor, Any, Rates, int, torch.Tensor], None]
    elementwise: bool = True


class _Weight:
    """A parameter, its state, and the sum of the gradients of the backward passes so far (`holds`: whether there are any)."""

    def __init__(self, parameter: torch.nn.Parameter, rule: UpdateRule) -> None:
        self.parameter = parameter
        self.state = rule.new_state(local(parameter.data) if rule.elementwise else parameter)
        self.held: HeldGradient | None = None
        self.holds = False


class TensorwiseOptimizer:
    """A `StepOptimizer` that runs an `UpdateRule` tensor by tensor. See the module."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], recipe: Recipe, rule: UpdateRule) -> None:
        self._recipe = recipe
        self._rule = rule
        self._weights = [_Weight(one, rule) for one in parameters]
        self._rate = recipe.learning_rate
        self._step = 1
        self._passes = 0
        self._last = True
        self._scale: torch.Tensor | None = None
        device = local(parameters[0].data).device if parameters else torch.device("cpu")
        self._norm = RunningNorm(len(parameters), recipe.max_grad_norm, device)
        self._hooks: list[Any] = []
        if recipe.optimizer_in_backward:
            for number, weight in enumerate(self._weights):
                hook = weight.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, number=number: self._gradient_arrived(number)
                )
                self._hooks.append(hook)

    def set_rate(self, rate: float) -> None:
        self._rate = rate

    def begin_backward(self, *, last: bool) -> None:
        self._last = last
        self._passes += 1

    def watch(self, loss: torch.Tensor) -> None:
        self._norm.watch(loss)

    def clip(self) -> torch.Tensor:
        for number, weight in enumerate(self._weights):
            if weight.holds:  # The last backward pass did not reach it.
                self._update_now(number, torch.zeros_like(local(weight.parameter.data)))
        norm = self._norm.close()
        if norm is None:
            kept = self._gradients()
            norm = norm_of_parts([one for _, one in kept], [self._weights[number].parameter for number, _ in kept])
            self._scale = self._norm.factor_for(norm)
        return norm

    def finish_step(self) -> None:
        for number, gradient in self._gradients():
            scale = self._scale if self._scale is not None else torch.ones((), device=gradient.device)
            self._update(number, gradient, scale)
        self._step += 1
        self._forget()

    def skip_step(self) -> None:
        if self._recipe.optimizer_in_backward:
            # Some weights may have taken this step; to count it for the others makes their next one smaller, never larger.
            self._step += 1
        self._forget()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _gradients(self) -> list[tuple[int, torch.Tensor]]:
        """Those that are kept, with their weights' numbers."""
        kept = [(number, weight.parameter.grad) for number, weight in enumerate(self._weights)]
        return [(number, local(gradient)) for number, gradient in kept if gradient is not None]

    def _forget(self) -> None:
        for weight in self._weights:
            weight.parameter.grad = None
            weight.holds = False
        self._scale = None
        self._norm.begin_step()
        self._passes = 0

    def _gradient_arrived(self, number: int) -> None:
        weight = self._weights[number]
        if weight.parameter.grad is None:
            return
        gradient = local(weight.parameter.grad)
        if self._last:
            self._update_now(number, gradient)
            return
        if weight.held is None:
            weight.held = new_held_gradient(gradient)
        hold_gradient(gradient, weight.held, self._seed(number), first=not weight.holds)
        weight.holds = True
        weight.parameter.grad = None

    def _update_now(self, number: int, gradient: torch.Tensor) -> None:
        weight = self._weights[number]
        if weight.holds and weight.held is not None:
            gradient = release_gradient(gradient, weight.held)
            weight.holds = False
        self._update(number, gradient, self._norm.arrive(number, gradient, weight.parameter))

    @torch.no_grad()
    def _update(self, number: int, gradient: torch.Tensor, scale: torch.Tensor) -> None:
        weight = self._weights[number]
        decay = self._recipe.weight_decay if weight.parameter.ndim > 1 else 0.0
        rates = Rates(self._rate, *BETAS, EPSILON, decay, self._step)
        part = values = local(weight.parameter.data)
        if not self._rule.elementwise:
            values, gradient = gathered(part, weight.parameter), gathered(gradient, weight.parameter)
        if values.numel():  # There is no shard here of a tensor with fewer rows than processes.
            self._rule.step(values, gradient, weight.state, rates, self._seed(number), scale)
        if values is not part:
            part.copy_(part_of(values, weight.parameter))
        weight.parameter.grad = None

    def _seed(self, number: int) -> int:
        return hash((self._recipe.seed, self._step, number, self._passes)) & 0x7FFFFFFF
