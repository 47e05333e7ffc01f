"""The Triton kernels behind `held_gradients`, each one pass over memory.

Imported only where a GPU is, since Triton comes with PyTorch's GPU builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from chaccu.train.held_gradients import HeldGradient
from chaccu.train.rounding import BLOCK
from chaccu.train.rounding_kernel import encode_rows, mix_bits, share_of_top_half

if TYPE_CHECKING:
    constexpr = int
else:
    constexpr = tl.constexpr

# Blocks that one program takes.
_BLOCKS = 8


def launch_hold(gradient: torch.Tensor, held: HeldGradient, seed: int, *, first: bool) -> None:
    """As `held_gradients.hold_gradient`, on the gradient's device."""
    count = gradient.numel()
    _hold[(triton.cdiv(count, BLOCK * _BLOCKS),)](
        gradient.contiguous(), *held, count, seed, FIRST=first, BLOCK=BLOCK, BLOCKS=_BLOCKS, num_warps=8
    )


def launch_release(gradient: torch.Tensor, held: HeldGradient) -> None:
    """Add what is held to a contiguous gradient in place."""
    count = gradient.numel()
    _release[(triton.cdiv(count, BLOCK * _BLOCKS),)](gradient, *held, count, BLOCK=BLOCK, BLOCKS=_BLOCKS, num_warps=8)


@triton.jit
def _decode(codes, scales, places, rows, inside, row_inside):  # type: ignore[no-untyped-def]
    code = tl.load(codes + places, mask=inside, other=0).to(tl.float32)
    size = tl.abs(code)
    # 127⁴.
    return code * size * size * size * (tl.load(scales + rows, mask=row_inside, other=0.0) / 260144641.0)[:, None]


@triton.jit
def _hold(  # type: ignore[no-untyped-def]
    gradient, codes, scales, count, seed, FIRST: constexpr, BLOCK: constexpr, BLOCKS: constexpr
) -> Any:
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = places < count
    row_inside = rows * BLOCK < count
    grad = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    if not FIRST:
        grad = grad + _decode(codes, scales, places, rows, inside, row_inside)
    bits = mix_bits((places.to(tl.uint32) + seed).to(tl.uint32))
    code, scale = encode_rows(grad, 127.0, share_of_top_half(bits), True)
    # The largest of a row leaves out what is not a number; the scale must show it.
    scale = scale + tl.sum(grad * 0.0, axis=1)
    code = tl.where(grad < 0.0, -code, code)
    code = tl.where(code == code, code, 0.0)
    tl.store(codes + places, code.to(tl.int8), mask=inside)
    tl.store(scales + rows, scale, mask=row_inside)


@triton.jit
def _release(gradient, codes, scales, count, BLOCK: constexpr, BLOCKS: constexpr) -> Any:  # type: ignore[no-untyped-def]
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = places < count
    row_inside = rows * BLOCK < count
    grad = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    grad = grad + _decode(codes, scales, places, rows, inside, row_inside)
    tl.store(gradient + places, grad.to(gradient.dtype.element_ty), mask=inside)
