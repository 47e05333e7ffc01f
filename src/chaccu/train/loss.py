"""Cross-entropy over the trained tokens only, without ever holding all logits.

The output projection is the dearest part of a small model with a large vocabulary (Gemma 3 270M: 168 of 268 million weights).
Only the
hidden states that predict a trained token go through it, a chunk at a time, and the gradient is taken in the same pass: the
softmax's derivative is at hand while the chunk's logits are, so nothing is recomputed and no logits are kept.

Tensor names: T trained tokens, C a chunk of them, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

_CHUNK_BYTES = 128 * 2**20


class _FusedCrossEntropy(torch.autograd.Function):
    """Sum of the tokens' cross-entropies; gradients for hidden states and, if it is trained, the projection."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, softcap: float
    ) -> torch.Tensor:
        chunk = max(1, _CHUNK_BYTES // (4 * weight_VD.shape[0]))
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        for start in range(0, hidden_TD.shape[0], chunk):
            hidden_CD, labels_C = hidden_TD[start : start + chunk], labels_T[start : start + chunk, None]
            logits_CV = (hidden_CD @ weight_VD.T).float()
            if softcap:
                logits_CV = softcap * torch.tanh(logits_CV / softcap)
            norm_C = torch.logsumexp(logits_CV, dim=-1, keepdim=True)
            total += (norm_C - logits_CV.gather(1, labels_C)).sum()
            if not (needs_hidden or needs_weight):
                continue
            slope_CV = 1 - (logits_CV / softcap) ** 2 if softcap else None
            grad_CV = logits_CV.sub_(norm_C).exp_()
            grad_CV.scatter_add_(1, labels_C, torch.full_like(norm_C, -1.0))
            if slope_CV is not None:
                grad_CV *= slope_CV
            grad_CV = grad_CV.to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[start : start + chunk] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (grad,) = grad_outputs
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        scaled_hidden = None if grad_hidden_TD is None else grad_hidden_TD * grad.to(grad_hidden_TD.dtype)
        scaled_weight = None if grad_weight_VD is None else (grad_weight_VD * grad).to(ctx.weight_dtype)
        return scaled_hidden, scaled_weight, None, None


def summed_cross_entropy(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, *, softcap: float = 0.0
) -> torch.Tensor:
    """Sum over T of −log softmax(hidden·weightᵀ)[label], a float32 scalar.

    `softcap` c > 0 replaces logits x by c·tanh(x / c) (Gemma 2 technical report, section 2.1). Divide by the step's
    trained tokens.
    """
    return _FusedCrossEntropy.apply(hidden_TD, weight_VD.to(hidden_TD.dtype), labels_T, softcap)  # type: ignore[no-any-return,no-untyped-call]
