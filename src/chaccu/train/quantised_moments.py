"""AdamW for bfloat16 weights in one pass over memory: 8-bit moments, stochastic rounding, no master copy.

A weight costs 2 bytes, its gradient 2, its moments 2: a step reads and writes 10 bytes a weight, which is what bounds it on a
GPU. The moments are held in blocks of 256 with one float32 scale each, as powers of an 8-bit code, so that small values keep
their precision: m = scale·sign(c)·(c/127)⁴, √v = scale·(c/255)² (v itself spans too many orders of magnitude). Both, and the
weight, are rounded stochastically: the expected value of what is stored is what was computed, so updates smaller than a step
are not lost, nor do slowly moving averages stick. m, which forgets soon, can bear coarse codes and reaches down to 4·10⁻⁹ of
its block's largest; √v, in which rounding adds up over 1,000 steps, gets fine ones and ends at 6·10⁻⁵ of the largest: a weight
with less is updated more slowly, never divided by nothing.

The step itself is `adam`'s; blocks of 8-bit moments are Dettmers et al. 2022 (arXiv:2110.02861).
The kernel and the plain PyTorch version compute the same function of the same random bits' distribution, not the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from chaccu.train.adam import Rates, step_plainly
from chaccu.train.rounding import count_blocks, decode_blocks, encode_blocks

# The largest code and the power of m and of √v.
_MEAN, _ROOT = (127, 4), (255, 2)
# The code of a √v that is not zero.
_LEAST_ROOT = 2


class Moments(NamedTuple):
    """State of a weight of n elements: codes (n,) int8 and uint8, scales (⌈n / 256⌉,) float32."""

    mean_codes: torch.Tensor
    mean_scales: torch.Tensor
    root_codes: torch.Tensor
    root_scales: torch.Tensor


def new_moments(parameter: torch.Tensor) -> Moments:
    """Moments of nothing seen yet."""
    count = parameter.numel()
    scales = torch.zeros(count_blocks(count), dtype=torch.float32, device=parameter.device)
    codes = torch.zeros(count, dtype=torch.int8, device=parameter.device)
    return Moments(codes, scales, torch.zeros_like(codes, dtype=torch.uint8), scales.clone())


def step_parameter(
    parameter: torch.Tensor, gradient: torch.Tensor, moments: Moments, rates: Rates, seed: int, scale: torch.Tensor
) -> None:
    """Update a contiguous `parameter` (bfloat16 or float32) and its moments in place. `scale`, a float32 scalar on the device,
    multiplies the gradient: what clips it need not be known to the processor. NaN in it leaves weight and moments as they are,
    whatever the gradient holds."""
    if not parameter.numel():
        return  # The shard of a tensor with fewer rows than processes.
    if parameter.is_cuda:
        from chaccu.train.adam_kernel import launch_step

        launch_step(parameter, gradient, moments, rates, seed, scale)
    else:
        _step_plainly(parameter, gradient, moments, rates, seed, scale)


def _step_plainly(
    parameter: torch.Tensor, gradient: torch.Tensor, moments: Moments, rates: Rates, seed: int, scale: torch.Tensor
) -> None:
    if not scale >= 0:
        return
    generator = torch.Generator(parameter.device).manual_seed(seed)
    mean_N, variance_N = decode_mean(moments), decode_root(moments) ** 2
    step_plainly(parameter, gradient.reshape(-1).float() * scale, mean_N, variance_N, rates, generator)
    root_N = variance_N.sqrt()
    codes_N, scales_B = encode_blocks(mean_N, *_MEAN, generator)
    moments.mean_codes.copy_(codes_N)
    moments.mean_scales.copy_(scales_B)
    codes_N, scales_B = encode_blocks(root_N, *_ROOT, generator)
    moments.root_codes.copy_(torch.where(root_N > 0, codes_N.clamp_min(_LEAST_ROOT), codes_N))
    moments.root_scales.copy_(scales_B)


def decode_mean(moments: Moments) -> torch.Tensor:
    """m, (n,) float32."""
    return decode_blocks(moments.mean_codes, moments.mean_scales, *_MEAN)


def decode_root(moments: Moments) -> torch.Tensor:
    """√v, (n,) float32."""
    return decode_blocks(moments.root_codes, moments.root_scales, *_ROOT)
