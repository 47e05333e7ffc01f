"""FlashAttention 4's kernels for packed rows, as PyTorch operators that a compiled layer calls without a break.

The package flash-attn-4 holds kernels for Hopper and newer chips: on an H100 almost twice as fast as those of FlashAttention 2
inside PyTorch. They are compiled when first called, in a few seconds for each width of a head. PyTorch's own way of taking them
in (`activate_flash_attention_impl`) reads two results of a function that has come to give five.

Tensor names: T tokens of a row, H heads, G heads of keys and values (G divides H), E width of a head, N + 1 starts.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from chaccu.errors import TrainError

_HOPPER = (9, 0)
# The gradient of the queries is wrong for narrower ones: 0.8 of its norm at 8 and 16, below 0.005 from 32 on (4.0.0b36, H100).
_LEAST_WIDTH = 32
_MOST_WIDTH = {9: 256}
_MOST_WIDTH_ELSEWHERE = 128


# What is marked so is asked once while a layer is compiled. Traced, the search for a package would cut the layer in two.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_flash_attention(device: int) -> bool:
    """Whether the kernels are installed and made for the GPU of that index."""
    return _is_hopper(device) and _is_installed()


@cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= _HOPPER


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def serves_width(width: int, device: int) -> bool:
    """Whether the kernels are right for heads of that width, forward and backward."""
    major = torch.cuda.get_device_capability(device)[0]
    return width % 8 == 0 and _LEAST_WIDTH <= width <= _MOST_WIDTH.get(major, _MOST_WIDTH_ELSEWHERE)


@cache
def _kernels() -> Any:
    try:
        from flash_attn.cute import interface
    except ImportError as error:
        raise TrainError(
            f"flash-attn-4 is installed but does not load: {error}.",
            remedy="install flash-attn-4[cu13] anew (cu13 where PyTorch is built for CUDA 13), or uninstall it",
        ) from error
    return interface


def attend(
    query_THE: torch.Tensor,
    key_TGE: torch.Tensor,
    value_TGE: torch.Tensor,
    starts_N: torch.Tensor,
    *,
    longest: int,
    scale: float,
    window: int,
) -> torch.Tensor:
    """Causal attention inside each conversation, (T, H, E).

    `starts_N`: int32, 0 and the running sums of lengths, none longer than `longest`; `window`: tokens that one sees, itself
    among them, or 0 for all before it. Raises `TrainError` when the package does not load.
    """
    out_THE: torch.Tensor = _attend(query_THE, key_TGE, value_TGE, starts_N, longest, scale, window)[0]
    return out_THE


def _mask(window: int) -> dict[str, Any]:
    return {"causal": True} if not window else {"window_size_left": window - 1, "window_size_right": 0}


@torch.library.custom_op("chaccu::flash_attention", mutates_args=())
def _attend(
    query_THE: torch.Tensor,
    key_TGE: torch.Tensor,
    value_TGE: torch.Tensor,
    starts_N: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    out_THE, log_sum_HT, *_ = _kernels()._flash_attn_fwd(
        query_THE,
        key_TGE,
        value_TGE,
        cu_seqlens_q=starts_N,
        cu_seqlens_k=starts_N,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        return_lse=True,
        **_mask(window),
    )
    return out_THE, log_sum_HT


@torch.library.custom_op("chaccu::flash_attention_backward", mutates_args=())
def _attend_backward(
    grad_THE: torch.Tensor,
    query_THE: torch.Tensor,
    key_TGE: torch.Tensor,
    value_TGE: torch.Tensor,
    out_THE: torch.Tensor,
    log_sum_HT: torch.Tensor,
    starts_N: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_query_THE, grad_key_TGE, grad_value_TGE, *_ = _kernels()._flash_attn_bwd(
        query_THE,
        key_TGE,
        value_TGE,
        out_THE,
        grad_THE,
        log_sum_HT,
        softmax_scale=scale,
        cu_seqlens_q=starts_N,
        cu_seqlens_k=starts_N,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        # In the order in memory of what they are gradients of: the next in line would otherwise have to copy them.
        dq=torch.empty_like(query_THE),
        dk=torch.empty_like(key_TGE),
        dv=torch.empty_like(value_TGE),
        **_mask(window),
    )
    return grad_query_THE, grad_key_TGE, grad_value_TGE


@_attend.register_fake
def _(
    query_THE: torch.Tensor, key_TGE: torch.Tensor, value_TGE: torch.Tensor, starts_N: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _width = query_THE.shape
    return query_THE.new_empty(query_THE.shape), query_THE.new_empty((heads, tokens), dtype=torch.float32)


@_attend_backward.register_fake
def _(
    grad_THE: torch.Tensor, query_THE: torch.Tensor, key_TGE: torch.Tensor, value_TGE: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query_THE), torch.empty_like(key_TGE), torch.empty_like(value_TGE)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, longest, scale, window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.rest = longest, scale, window


def _differentiate(ctx: Any, grad_THE: torch.Tensor, grad_log_sum: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    query_THE, key_TGE, value_TGE, starts_N, out_THE, log_sum_HT = ctx.saved_tensors
    grads = _attend_backward(grad_THE, query_THE, key_TGE, value_TGE, out_THE, log_sum_HT, starts_N, *ctx.rest)
    return (*grads, None, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_keep)


# Without these the compiler would think attention free, and compute it again to save memory. They are upper bounds: not every
# conversation is as long as the longest.
@register_flop_formula(torch.ops.chaccu.flash_attention)
def _count_flops(
    query_shape: Any, key_shape: Any, value_shape: Any, starts_shape: Any, longest: int, *_: Any, **__: Any
) -> int:
    tokens, heads, width = query_shape
    return int(2 * tokens * longest * heads * width)


@register_flop_formula(torch.ops.chaccu.flash_attention_backward)
def _count_backward_flops(grad_shape: Any, *shapes: Any, **_: Any) -> int:
    tokens, heads, width = grad_shape
    return int(5 * tokens * shapes[6] * heads * width)
