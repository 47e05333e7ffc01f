"""Stochastic rounding: to bfloat16, and to 8-bit codes in blocks. What is stored is, in expectation, what was computed.

Rounding to the nearest loses every update smaller than half a step, each time; stochastic rounding goes up as often as the
value lies close to the upper neighbour, so that small updates add up. Blocks of 256 values share one float32 scale, their
largest absolute value (Dettmers et al. 2022, arXiv:2110.02861); a code c stands for scale·sign(c)·(|c| / top)^power, which
leaves small values more precision than even steps would.

A block that holds a value that is not finite decodes to values that are not finite: what came in is not lost from sight.
"""

from __future__ import annotations

import math

import torch

BLOCK = 256


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """float32 `values` in `dtype`: rounded stochastically for bfloat16, else as PyTorch converts."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    # bfloat16 is the upper half of float32: adding a random lower half and cutting it off rounds up in proportion.
    noise = torch.randint(0, 2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits = (values.contiguous().view(torch.int32) + noise) & -(2**16)
    # The bits of what is not a number would run over into those of another one.
    return torch.where(values.isnan(), values, bits.view(torch.float32)).to(torch.bfloat16)


def count_blocks(count: int) -> int:
    """Blocks, and so scales, of `count` values."""
    return math.ceil(count / BLOCK)


def encode_blocks(
    values_N: torch.Tensor, top: int, power: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n,) float32 from -top to top, and the scale of each block (⌈n / 256⌉,) float32."""
    blocks_BN = torch.nn.functional.pad(values_N, (0, -len(values_N) % BLOCK)).view(-1, BLOCK)
    scales_B = blocks_BN.abs().amax(dim=1)
    share_N = (blocks_BN.abs() / scales_B.clamp_min(1e-30)[:, None]).view(-1)[: len(values_N)]
    low_N = (top * share_N ** (1 / power)).floor().clamp(0, top - 1)
    # How far the share lies between the values of two codes.
    up_N = (share_N * top**power - low_N**power) / ((low_N + 1) ** power - low_N**power)
    chance_N = torch.rand(share_N.shape, generator=generator, device=share_N.device)
    code_N = low_N + (chance_N < up_N).float()
    return torch.where(values_N < 0, -code_N, code_N), scales_B


def decode_blocks(code_N: torch.Tensor, scales_B: torch.Tensor, top: int, power: int) -> torch.Tensor:
    """The values (n,) float32 that codes of any dtype stand for."""
    code_N = code_N.float()
    share_N: torch.Tensor = code_N * code_N.abs().pow(power - 1) / top**power
    return share_N * scales_B.repeat_interleave(BLOCK)[: len(code_N)]
