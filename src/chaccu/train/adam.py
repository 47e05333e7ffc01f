"""AdamW's step (Loshchilov & Hutter 2019, arXiv:1711.05101), whatever its moments are held in.

m ← m + (1 − β₁)·(g − m), v ← v + (1 − β₂)·(g² − v), and the weight goes by −rate·m̂ / (√v̂ + ε) and by −rate·decay·weight, where
m̂ and v̂ have the bias of their beginning at 0 taken out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from chaccu.train.rounding import round_stochastically

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Rates(NamedTuple):
    """One step's numbers. `step` counts from 1."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    step: int


class StepNumbers(NamedTuple):
    """What a step multiplies by, in the order in which kernels take it: `kept` of a weight after its decay; `step_size`: the
    learning rate with m's bias taken out; `root_scale`: what takes v's bias out of √v."""

    beta1: float
    beta2: float
    epsilon: float
    kept: float
    step_size: float
    root_scale: float


def step_numbers(rates: Rates) -> StepNumbers:
    """The numbers of a step by its rates."""
    return StepNumbers(
        rates.beta1,
        rates.beta2,
        rates.epsilon,
        1 - rates.learning_rate * rates.weight_decay,
        rates.learning_rate / (1 - rates.beta1**rates.step),
        1 / math.sqrt(1 - rates.beta2**rates.step),
    )


def step_plainly(
    parameter: torch.Tensor,
    grad_N: torch.Tensor,
    mean_N: torch.Tensor,
    variance_N: torch.Tensor,
    rates: Rates,
    generator: torch.Generator,
) -> None:
    """Update a contiguous `parameter` of n elements, rounded stochastically where it is bfloat16, and m and v in place: (n,)
    float32, as the gradient is."""
    numbers = step_numbers(rates)
    mean_N += (1 - numbers.beta1) * (grad_N - mean_N)
    variance_N += (1 - numbers.beta2) * (grad_N.square() - variance_N)
    moved_N = numbers.step_size * mean_N / (variance_N.sqrt() * numbers.root_scale + numbers.epsilon)
    weight_N = parameter.reshape(-1).float() * numbers.kept - moved_N
    parameter.reshape(-1).copy_(round_stochastically(weight_N, parameter.dtype, generator))
