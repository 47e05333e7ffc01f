"""AdamW for bfloat16 weights in one pass over memory: moments in bfloat16 too, stochastic rounding, no master copy.

A weight costs 2 bytes, its gradient 2, its moments 4: a step reads and writes 14 bytes a weight. Weight, m and v are all
rounded stochastically. v needs it as the weight does: with β₂ = 0.999 a step moves it by a thousandth of itself, and the
nearest bfloat16 is up to four thousandths away, so that rounded to the nearest it would stay at whatever it first was. With
stochastic rounding it is right in expectation, and its rounding adds up over 1 / (1 − β₂) steps to some 5 % of v, 2.5 % of √v:
no more than the spread that 1,000 random gradients leave in v by themselves. m, which a step moves by a tenth, would not stick;
its rounding is stochastic because that costs nothing.

AdamW is Loshchilov & Hutter 2019 (arXiv:1711.05101); stochastic rounding of bfloat16 weights is Zamirai et al. 2020
(arXiv:2010.06192). The kernel and the plain PyTorch version compute the same function of the same random bits' distribution,
not the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from chaccu.train.adam import Rates, step_plainly
from chaccu.train.rounding import round_stochastically


class BFloat16Moments(NamedTuple):
    """State of a weight of n elements: m and v, each (n,) bfloat16."""

    mean: torch.Tensor
    variance: torch.Tensor


def new_moments(parameter: torch.Tensor) -> BFloat16Moments:
    """Moments of nothing seen yet."""
    mean = torch.zeros(parameter.numel(), dtype=torch.bfloat16, device=parameter.device)
    return BFloat16Moments(mean, mean.clone())


def step_parameter(
    parameter: torch.Tensor, gradient: torch.Tensor, moments: BFloat16Moments, rates: Rates, seed: int, scale: torch.Tensor
) -> None:
    """Update a contiguous `parameter` (bfloat16 or float32) and its moments in place. `scale`, a float32 scalar on the device,
    multiplies the gradient; where it is not a number, nothing is changed."""
    if parameter.is_cuda:
        from chaccu.train.bfloat16_kernel import launch_step

        launch_step(parameter, gradient, moments, rates, seed, scale)
    else:
        _step_plainly(parameter, gradient, moments, rates, seed, scale)


def _step_plainly(
    parameter: torch.Tensor, gradient: torch.Tensor, moments: BFloat16Moments, rates: Rates, seed: int, scale: torch.Tensor
) -> None:
    if scale.isnan():
        return
    generator = torch.Generator(parameter.device).manual_seed(seed)
    mean_N, variance_N = moments.mean.float(), moments.variance.float()
    step_plainly(parameter, gradient.reshape(-1).float() * scale, mean_N, variance_N, rates, generator)
    moments.mean.copy_(round_stochastically(mean_N, torch.bfloat16, generator))
    moments.variance.copy_(round_stochastically(variance_N, torch.bfloat16, generator))
