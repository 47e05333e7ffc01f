"""The Triton kernel behind `bfloat16_moments`: the whole step of a weight in one pass over its memory.

Imported only where a GPU is, since Triton comes with PyTorch's GPU builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from chaccu.train.adam import Rates, step_numbers
from chaccu.train.bfloat16_moments import BFloat16Moments
from chaccu.train.rounding_kernel import mix_bits, round_to_bfloat16

if TYPE_CHECKING:
    constexpr = int
else:
    constexpr = tl.constexpr

# Weights that one program takes.
_SIZE = 2048


def launch_step(
    parameter: torch.Tensor, gradient: torch.Tensor, moments: BFloat16Moments, rates: Rates, seed: int, scale: torch.Tensor
) -> None:
    """As `bfloat16_moments.step_parameter`, on the parameter's device."""
    count = parameter.numel()
    _step[(triton.cdiv(count, _SIZE),)](
        parameter,
        gradient.contiguous(),
        *moments,
        scale,
        count,
        seed,
        *step_numbers(rates),
        ROUNDS=parameter.dtype == torch.bfloat16,
        SIZE=_SIZE,
        num_warps=8,
    )


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    parameter,
    gradient,
    means,
    variances,
    scale,
    count,
    seed,
    beta1,
    beta2,
    epsilon,
    decay,
    step_size,
    root_scale,
    ROUNDS: constexpr,
    SIZE: constexpr,
) -> Any:
    places = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    factor = tl.load(scale)
    # NaN is not at least 0: then there is nothing to load, and nothing to store.
    inside = places < tl.where(factor >= 0.0, count, 0)
    grad = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32) * factor

    mean = tl.load(means + places, mask=inside, other=0.0).to(tl.float32)
    mean = mean + (1.0 - beta1) * (grad - mean)
    variance = tl.load(variances + places, mask=inside, other=0.0).to(tl.float32)
    variance = variance + (1.0 - beta2) * (grad * grad - variance)

    weight = tl.load(parameter + places, mask=inside, other=0.0).to(tl.float32)
    weight = weight * decay - step_size * mean / (tl.sqrt(variance) * root_scale + epsilon)
    first = mix_bits((places.to(tl.uint32) + seed).to(tl.uint32))
    second = mix_bits(first + 0x9E3779B9)
    if ROUNDS:
        weight = round_to_bfloat16(weight, first & 0xFFFF)
    tl.store(parameter + places, weight.to(parameter.dtype.element_ty), mask=inside)
    tl.store(means + places, round_to_bfloat16(mean, first >> 16).to(tl.bfloat16), mask=inside)
    tl.store(variances + places, round_to_bfloat16(variance, second & 0xFFFF).to(tl.bfloat16), mask=inside)
