"""The sum of a step's gradients, held in 8 bits from one backward pass to the next: 1 byte a weight instead of 2.

With `optimizer_in_backward` and accumulation, a weight's gradient is added to its sum as soon as it is there; in the last
backward pass of the step the sum is added to the last gradient, and the optimizer takes the whole. Codes are those of m (see
`rounding`: blocks of 256, fourth powers), rounded stochastically: the gradient that the optimizer sees is, in expectation, the
sum, each rounding adding some 3 % of noise to a value. The last gradient of a step is not rounded so.

Not chosen: to fold each gradient into the moments (AdamA, Zhang et al. 2023, arXiv:2305.19982). That needs no sum, but v then
averages Σgᵢ² where Adam averages (Σgᵢ)²: it leaves out the cross terms 2·Σgᵢgⱼ. Where the gradients of the n passes are
independent noise the two are equal in expectation; where they agree v is n times too small, and updates up to √n times too
large. Nor could the norm of the whole gradient be clipped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from chaccu.train.rounding import count_blocks, decode_blocks, encode_blocks

# The largest code and the power.
_CODE = (127, 4)


class HeldGradient(NamedTuple):
    """The sum for a weight of n elements: codes (n,) int8, scales (⌈n / 256⌉,) float32. Not initialised: the first gradient
    that is held takes the place of what stands there."""

    codes: torch.Tensor
    scales: torch.Tensor


def new_held_gradient(parameter: torch.Tensor) -> HeldGradient:
    """Room for the sum of a parameter's gradients."""
    codes = torch.empty(parameter.numel(), dtype=torch.int8, device=parameter.device)
    return HeldGradient(codes, torch.empty(count_blocks(len(codes)), dtype=torch.float32, device=parameter.device))


@torch.no_grad()
def hold_gradient(gradient: torch.Tensor, held: HeldGradient, seed: int, *, first: bool) -> None:
    """Add a gradient to what is held, or begin with it."""
    if not gradient.numel():
        return  # The shard of a tensor with fewer rows than processes.
    if gradient.is_cuda:
        from chaccu.train.held_kernel import launch_hold

        launch_hold(gradient, held, seed, first=first)
        return
    sum_N = gradient.reshape(-1).float()
    sum_N = sum_N if first else sum_N + decode_blocks(*held, *_CODE)
    codes_N, scales_B = encode_blocks(sum_N, *_CODE, torch.Generator(gradient.device).manual_seed(seed))
    held.codes.copy_(codes_N.nan_to_num())
    held.scales.copy_(scales_B)


@torch.no_grad()
def release_gradient(gradient: torch.Tensor, held: HeldGradient) -> torch.Tensor:
    """The gradient with what is held added, in its own memory where that is contiguous."""
    gradient = gradient.contiguous()
    if not gradient.numel():
        return gradient
    if gradient.is_cuda:
        from chaccu.train.held_kernel import launch_release

        launch_release(gradient, held)
    else:
        gradient.view(-1).add_(decode_blocks(*held, *_CODE))
    return gradient
