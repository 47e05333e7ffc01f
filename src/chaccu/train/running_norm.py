"""`RunningNorm`: by what to clip gradients that come one by one, when the norm over all of them is not known yet.

Clipping scales a gradient by min(1, limit / norm), norm being that over all weights (Pascanu et al. 2013, arXiv:1211.5063).
Here it is what is known of it: from this step for the tensors whose gradients have come, from the step before for the others
(in the first step, nothing), and never less than that of the tensor at hand.

Invariants: a factor is NaN from the first value on that is not finite, to the end of the step; nothing waits for the device; a
step that was not finite is not remembered. On a GPU a gradient takes two kernels, one pass over its memory and one over a
thousand numbers: with one for every operation below they would cost more than the pass.
"""

from __future__ import annotations

import torch

from chaccu.train.shards import is_divided, norm_of_parts

# The norm that a factor is taken from is never 0.
LEAST_NORM = 1e-6


class RunningNorm:
    """Of the gradients of K weights, by their numbers. `limit`: the most that the norm over all may be."""

    def __init__(self, weights: int, limit: float, device: torch.device) -> None:
        self._limit = limit
        self._squares_K = torch.zeros(weights, dtype=torch.float32, device=device)
        self._before_K = torch.zeros_like(self._squares_K)
        # The square of the norm as far as it is known; 0, or NaN once something was not finite; the last factor; scratch.
        self._known, self._nothing, self._factor = (self._squares_K.new_zeros(()) for _ in range(3))
        self._partial_sums: torch.Tensor | None = None
        self._came = False

    def watch(self, value: torch.Tensor) -> None:
        """Take note of a scalar, such as a loss, without which the step is nothing."""
        self._nothing += 0.0 * value

    def arrive(self, number: int, gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The factor for the gradient of weight `number`, a float32 scalar on the device, to be used before the next arrives.

        `gradient` is what is here of it; `like` is cut among processes as it is.
        """
        self._came = True
        if gradient.is_cuda and not is_divided(like):
            from chaccu.train.norm_kernel import launch_arrive, new_partial_sums

            self._partial_sums = new_partial_sums(gradient) if self._partial_sums is None else self._partial_sums
            state = (self._squares_K, self._before_K, self._known, self._nothing, self._factor)
            launch_arrive(gradient, self._partial_sums, state, number, self._limit)
            return self._factor
        square = norm_of_parts([gradient], [like]).square()
        self._known.copy_(torch.maximum(self._known + square - self._before_K[number], square))
        self._squares_K[number] = square
        self.watch(square)
        return self.factor_for(self._known.sqrt())

    def factor_for(self, norm: torch.Tensor) -> torch.Tensor:
        """What gradients are scaled by whose norm over all is `norm`."""
        return (self._limit / (norm + LEAST_NORM)).clamp(max=1.0) + self._nothing + 0.0 * norm

    def close(self) -> torch.Tensor | None:
        """The norm over all that came, a float32 scalar on the device, or None when nothing did; it is remembered."""
        if not self._came:
            return None
        norm = self._squares_K.sum().sqrt()
        self._before_K.copy_(torch.where(norm.isfinite(), self._squares_K, self._before_K))
        return norm

    def begin_step(self) -> None:
        """Forget the step that is over, but for what `close` remembered."""
        self._came = False
        self._squares_K.zero_()
        self._nothing.zero_()
        self._known.copy_(self._before_K.sum())
