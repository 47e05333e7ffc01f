"""Cross-entropy over the trained tokens only, without ever holding all logits.

The output projection is the dearest part of a small model with a large vocabulary (Gemma 3 270M: 168 of 268 million weights).
Only the hidden states that predict a trained token go through it, a chunk at a time, and the gradient, where one is wanted, is
taken in the same pass: the softmax's derivative is at hand while the chunk's logits are, so nothing is recomputed and no logits
are kept.

float16 ends at 65,504 and is coarse below 6·10⁻⁵, where most chances in a large vocabulary lie. There derivatives by logits are
held `_LIFT` times as large, sums over tokens are taken in float32, and what comes from above (a loss scale divided by the
step's tokens) is multiplied in float32 and rounded once.

Tensor names: T trained tokens, C a chunk of them, D hidden width, V vocabulary, K rows that replace rows of the projection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# Of a chunk's logits in float32, which a processor holds; on a GPU they stay in 16 bits and a chunk pays to be large.
_CHUNK_BYTES, _GPU_CHUNK_BYTES = 128 * 2**20, 512 * 2**20
# Of derivatives by logits in float16: they are at most 1, and a hidden state's gradient at most twice the largest weight.
_LIFT = 256.0


class _FusedCrossEntropy(torch.autograd.Function):
    """Sum of the tokens' cross-entropies; gradients for hidden states and for what of the projection is trained."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        rows_KD: torch.Tensor,
        labels_T: torch.Tensor,
        ids_K: torch.Tensor,
        softcap: float,
    ) -> torch.Tensor:
        on_gpu = hidden_TD.is_cuda
        chunk = max(1, (_GPU_CHUNK_BYTES if on_gpu else _CHUNK_BYTES) // (4 * weight_VD.shape[0]))
        score = _compiled_score() if on_gpu else _score_in_place
        lift = _LIFT if hidden_TD.dtype == torch.float16 else 1.0
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        needs_hidden, needs_weight, needs_rows = ctx.needs_input_grad[:3]
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD: torch.Tensor | None = None
        grad_rows_KD = torch.zeros_like(rows_KD, dtype=torch.float32) if needs_rows else None
        for start in range(0, hidden_TD.shape[0], chunk):
            hidden_CD, labels_C = hidden_TD[start : start + chunk], labels_T[start : start + chunk, None]
            logits_CV = hidden_CD @ weight_VD.T
            if len(ids_K):
                logits_CV[:, ids_K] = hidden_CD @ rows_KD.T
            part, grad_CV = score(logits_CV, labels_C, softcap, lift)
            total += part
            if not (needs_hidden or needs_weight or needs_rows):
                continue
            if grad_hidden_TD is not None:
                grad_hidden_TD[start : start + chunk] = grad_CV @ weight_VD
            if len(ids_K):
                grad_CK = grad_CV[:, ids_K]
                if grad_hidden_TD is not None:
                    grad_hidden_TD[start : start + chunk] += grad_CK @ (rows_KD - weight_VD[ids_K])
                if grad_rows_KD is not None:
                    grad_rows_KD += _sum_products(grad_CK, hidden_CD)
            if needs_weight:
                grad_CV[:, ids_K] = 0
                if grad_weight_VD is None:
                    grad_weight_VD = _sum_products(grad_CV, hidden_CD).float()
                else:
                    grad_weight_VD += _sum_products(grad_CV, hidden_CD)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD, grad_rows_KD)
        ctx.lift = lift
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype, rows_KD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        scaled = (
            None if saved is None else _scale(saved, grad / ctx.lift, dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def _sum_products(grad_CK: torch.Tensor, hidden_CD: torch.Tensor) -> torch.Tensor:
    """gradᵀ·hidden (K, D), a sum over the chunk's tokens: in float32 where that of many may pass float16's largest."""
    if hidden_CD.dtype != torch.float16:
        return grad_CK.T @ hidden_CD
    if hidden_CD.is_cuda:
        return torch.mm(grad_CK.T, hidden_CD, out_dtype=torch.float32)
    return grad_CK.T.float() @ hidden_CD.float()


def _scale(saved: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if torch.float16 in (saved.dtype, dtype):
        return (saved.float() * factor).to(dtype)
    return (saved * factor.to(saved.dtype)).to(dtype)


def _score_in_place(
    logits_CV: torch.Tensor, labels_C1: torch.Tensor, softcap: float, lift: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk's summed cross-entropy (float32), and `lift` times its derivative by the logits in their dtype."""
    scores_CV = logits_CV.float()
    if softcap:
        scores_CV = softcap * torch.tanh(scores_CV / softcap)
    picked_C1 = scores_CV.gather(1, labels_C1)
    slope_CV = 1 - (scores_CV / softcap) ** 2 if softcap else None
    # In place from here: the chunk is as large as a small model's weights, and passing over it is what costs.
    top_C1 = scores_CV.amax(dim=-1, keepdim=True)
    exp_CV = scores_CV.sub_(top_C1).exp_()
    sum_C1 = exp_CV.sum(dim=-1, keepdim=True)
    total = (sum_C1.log() + top_C1 - picked_C1).sum()
    grad_CV = exp_CV.div_(sum_C1)
    grad_CV.scatter_add_(1, labels_C1, torch.full_like(sum_C1, -1.0))
    if slope_CV is not None:
        grad_CV *= slope_CV
    if lift != 1:
        grad_CV *= lift
    return total, grad_CV.to(logits_CV.dtype)


def _score(logits_CV: torch.Tensor, labels_C1: torch.Tensor, softcap: float, lift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_score_in_place`, written for the compiler: two passes over the chunk."""
    scores_CV = logits_CV.float()
    if softcap:
        scores_CV = softcap * torch.tanh(scores_CV / softcap)
    normaliser_C1 = scores_CV.logsumexp(dim=-1, keepdim=True)
    total = (normaliser_C1 - scores_CV.gather(1, labels_C1)).sum()
    grad_CV = (scores_CV - normaliser_C1).exp()
    grad_CV = grad_CV - (torch.arange(logits_CV.shape[1], device=logits_CV.device) == labels_C1).float()
    if softcap:
        grad_CV = grad_CV * (1 - (scores_CV / softcap) ** 2)
    if lift != 1:
        grad_CV = grad_CV * lift
    return total, grad_CV.to(logits_CV.dtype)


@cache
def _compiled_score() -> Callable[[torch.Tensor, torch.Tensor, float, float], tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_score, dynamic=True)


def summed_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    rows_KD: torch.Tensor | None = None,
    ids_K: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Sum over T of −log softmax(hidden·weightᵀ)[label], a float32 scalar.

    `rows_KD` take the place of the rows `ids_K` of the projection, so that a few rows can be trained while the rest is frozen.
    `softcap` c > 0 replaces logits x by c·tanh(x / c) (Gemma 2 technical report, section 2.1). Divide by the step's trained
    tokens.
    """
    if rows_KD is None or ids_K is None:
        rows_KD, ids_K = hidden_TD.new_empty(0, hidden_TD.shape[1]), labels_T.new_empty(0)
    weight_VD, rows_KD = weight_VD.to(hidden_TD.dtype), rows_KD.to(hidden_TD.dtype)
    if not torch.is_grad_enabled():
        # To a Function a weight that is trained needs its gradient, even where no graph is made.
        hidden_TD, weight_VD, rows_KD = hidden_TD.detach(), weight_VD.detach(), rows_KD.detach()
    return _FusedCrossEntropy.apply(hidden_TD, weight_VD, rows_KD, labels_T, ids_K, softcap)  # type: ignore[no-any-return,no-untyped-call]
