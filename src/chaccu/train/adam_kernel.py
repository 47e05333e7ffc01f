"""The Triton kernel behind `quantised_moments`: the whole step of a weight in one pass over its memory.

Imported only where a GPU is, since Triton comes with PyTorch's GPU builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from chaccu.train.adam import Rates, step_numbers
from chaccu.train.quantised_moments import Moments
from chaccu.train.rounding import BLOCK
from chaccu.train.rounding_kernel import encode_rows, mix_bits, round_to_bfloat16, share_of_top_half

if TYPE_CHECKING:
    constexpr = int
else:
    constexpr = tl.constexpr

# Blocks that one program takes: enough loads in flight to fill the memory's pipes.
_BLOCKS = 8


def launch_step(
    parameter: torch.Tensor, gradient: torch.Tensor, moments: Moments, rates: Rates, seed: int, scale: torch.Tensor
) -> None:
    """As `quantised_moments.step_parameter`, on the parameter's device."""
    count = parameter.numel()
    _step[(triton.cdiv(count, BLOCK * _BLOCKS),)](
        parameter,
        gradient.contiguous(),
        *moments,
        scale,
        count,
        seed,
        *step_numbers(rates),
        ROUNDS=parameter.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        BLOCKS=_BLOCKS,
        num_warps=8,
    )


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    parameter,
    gradient,
    mean_codes,
    mean_scales,
    root_codes,
    root_scales,
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
    BLOCK: constexpr,
    BLOCKS: constexpr,
) -> Any:
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    factor = tl.load(scale)
    # NaN is not at least 0: then there is nothing to load, and nothing to store.
    count = tl.where(factor >= 0.0, count, 0)
    inside = places < count
    row_inside = rows * BLOCK < count
    grad = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32) * factor

    code = tl.load(mean_codes + places, mask=inside, other=0).to(tl.float32)
    size = tl.abs(code)
    mean = code * size * size * size * (tl.load(mean_scales + rows, mask=row_inside, other=0.0) / 260144641.0)[:, None]
    mean = mean + (1.0 - beta1) * (grad - mean)
    code = tl.load(root_codes + places, mask=inside, other=0).to(tl.float32)
    root = code * code * (tl.load(root_scales + rows, mask=row_inside, other=0.0) / 65025.0)[:, None]
    variance = root * root
    root = tl.sqrt(variance + (1.0 - beta2) * (grad * grad - variance))

    weight = tl.load(parameter + places, mask=inside, other=0.0).to(tl.float32)
    weight = weight * decay - step_size * mean / (root * root_scale + epsilon)
    first = mix_bits((places.to(tl.uint32) + seed).to(tl.uint32))
    second = mix_bits(first + 0x9E3779B9)
    if ROUNDS:
        weight = round_to_bfloat16(weight, first & 0xFFFF)
    tl.store(parameter + places, weight.to(parameter.dtype.element_ty), mask=inside)

    codes, scales = encode_rows(mean, 127.0, share_of_top_half(first), True)
    tl.store(mean_codes + places, tl.where(mean < 0.0, -codes, codes).to(tl.int8), mask=inside)
    tl.store(mean_scales + rows, scales, mask=row_inside)
    codes, scales = encode_rows(root, 255.0, share_of_top_half(second), False)
    codes = tl.where(root > 0.0, tl.maximum(codes, 2.0), codes)
    tl.store(root_codes + places, codes.to(tl.int32).to(tl.uint8), mask=inside)
    tl.store(root_scales + rows, scales, mask=row_inside)
