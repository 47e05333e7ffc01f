"""The Triton kernels behind `running_norm`: the squares of a gradient in one pass, and all that follows from their sum in one.

Imported only where a GPU is, since Triton comes with PyTorch's GPU builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from chaccu.train.running_norm import LEAST_NORM

if TYPE_CHECKING:
    constexpr = int
else:
    constexpr = tl.constexpr

# Elements that a program takes at once, and the most programs: several for each multiprocessor of the largest chips.
_SIZE, _PROGRAMS = 4096, 1024


def new_partial_sums(gradient: torch.Tensor) -> torch.Tensor:
    """Scratch for `launch_arrive`."""
    return torch.empty(_PROGRAMS, dtype=torch.float32, device=gradient.device)


def launch_arrive(
    gradient: torch.Tensor, partial_sums: torch.Tensor, state: tuple[torch.Tensor, ...], number: int, limit: float
) -> None:
    """As `RunningNorm.arrive`, on the gradient's device. `state`: squares (K,), squares of the step before (K,), and three
    scalars: what is known, nothing, and the factor, which is written."""
    count = gradient.numel()
    programs = max(1, min(_PROGRAMS, triton.cdiv(count, _SIZE)))
    rounds = triton.cdiv(count, programs * _SIZE)
    _sum_squares[(programs,)](gradient.contiguous(), partial_sums, count, programs, ROUNDS=rounds, SIZE=_SIZE, num_warps=8)
    _decide[(1,)](partial_sums, programs, *state, number, limit, LEAST_NORM, PROGRAMS=_PROGRAMS, num_warps=4)


@triton.jit
def _sum_squares(gradient, partial_sums, count, programs, ROUNDS: constexpr, SIZE: constexpr) -> Any:  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for number in range(ROUNDS):
        places = (number * programs + program) * SIZE + tl.arange(0, SIZE)
        values = tl.load(gradient + places, mask=places < count, other=0.0).to(tl.float32)
        total += values * values
    tl.store(partial_sums + program, tl.sum(total, axis=0))


@triton.jit
def _decide(  # type: ignore[no-untyped-def]
    partial_sums, programs, squares, before, known, nothing, factor, number, limit, least, PROGRAMS: constexpr
) -> Any:
    places = tl.arange(0, PROGRAMS)
    square = tl.sum(tl.load(partial_sums + places, mask=places < programs, other=0.0), axis=0)
    in_all = tl.maximum(tl.load(known) + square - tl.load(before + number), square)
    zero = tl.load(nothing) + 0.0 * square
    tl.store(squares + number, square)
    tl.store(known, in_all)
    tl.store(nothing, zero)
    # Of a square that is not finite the maximum may be; `zero` is not.
    tl.store(factor, tl.minimum(limit / (tl.sqrt(in_all) + least), 1.0) + zero)
