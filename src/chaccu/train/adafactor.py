"""Adafactor: a row and a column of second moments for a matrix, in place of one for each weight; no first moment.

Shazeer & Stern 2018 (arXiv:1804.04235) as transformers implements it, with the recipe's learning rate as it is: no relative
step sizes, no scaling by the weight's own size; the decay rate of the second moments is 1 − t^−0.8, and an update whose root
mean square is above 1 is scaled down to it. This is what Hugging Face's Trainer means by `adafactor`. (PyTorch's own always
multiplies the rate by the weight's size, and waits for the device twice a tensor.)

transformers' rounds bfloat16 weights to the nearest, which loses most updates. Here it is given each weight as float32, for as
long as its update takes, and the result is rounded stochastically: 2 bytes a weight and next to nothing for the state (4 bytes
for a row or a column), and for the time of an update some 20 bytes for each weight of the tensor at hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from chaccu.train.adam import Rates
from chaccu.train.rounding import round_stochastically


class Factors(NamedTuple):
    """A weight's own Adafactor, and the float32 parameter that it updates: empty between steps."""

    inner: Any
    stand_in: torch.nn.Parameter


def new_factors(parameter: torch.Tensor) -> Factors:
    """Second moments of nothing seen yet."""
    from transformers.optimization import Adafactor

    stand_in = torch.nn.Parameter(torch.empty(0, dtype=torch.float32, device=parameter.device))
    inner = Adafactor([stand_in], lr=0.0, scale_parameter=False, relative_step=False)  # type: ignore[no-untyped-call]
    return Factors(inner, stand_in)


def step_parameter(
    parameter: torch.Tensor, gradient: torch.Tensor, factors: Factors, rates: Rates, seed: int, scale: torch.Tensor
) -> None:
    """Update `parameter` (bfloat16 or float32) and its second moments in place, by the learning rate and the weight decay of
    `rates`. `scale`, a float32 scalar on the device, multiplies the gradient; where it is NaN, nothing is changed."""
    inner, stand_in = factors
    (group,) = inner.param_groups
    group.update(lr=rates.learning_rate, weight_decay=rates.weight_decay)
    before = {name: kept.clone() for name, kept in _moments(factors).items()}
    stand_in.data = parameter.to(torch.float32, copy=True)
    stand_in.grad = gradient.float() * scale
    inner.step()
    stand_in.grad = None
    counts = ~scale.isnan()
    for name, kept in _moments(factors).items():
        kept.copy_(torch.where(counts, kept, before.get(name, torch.zeros_like(kept))))
    generator = torch.Generator(parameter.device).manual_seed(seed)
    rounded = round_stochastically(stand_in.data, parameter.dtype, generator)
    parameter.copy_(torch.where(counts, rounded, parameter))
    stand_in.data = torch.empty(0, dtype=torch.float32, device=parameter.device)


def _moments(factors: Factors) -> dict[str, torch.Tensor]:
    """What Adafactor remembers of the gradients: row and column of a matrix, or all of a vector."""
    state = factors.inner.state[factors.stand_in]
    return {name: kept for name, kept in state.items() if name.startswith("exp_avg_sq")}
