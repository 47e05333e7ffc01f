"""Causal attention over packed rows: transformers' models call it by name, and conversations of a row never meet.

A row's conversations lie end to end; `PackedLengths` says where each ends. On a GPU that has them, variable-length kernels take
the whole row at once (bf16 and fp16): FlashAttention 4's where that is installed, else PyTorch's own. Elsewhere scaled
dot-product attention runs one conversation after another. All do only the work of the conversations themselves, where a block
mask over the row would do that of all pairs.

Tensor names: T tokens of a row, H heads, G heads of keys and values (G divides H), E width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from chaccu.errors import TrainError
from chaccu.train.flash_attention import attend as flash_attend
from chaccu.train.flash_attention import has_flash_attention, serves_width

ATTENTION = "chaccu_packed"
# The number of conversations differs from row to row; a few sizes of its tensor keep a compiled model from being compiled anew.
_ENDS_BUCKET = 16


class PackedLengths(NamedTuple):
    """Where a row's conversations lie: `lengths` sum to T; `starts_N` (int32, on the device) holds 0 and their running sums,
    with T repeated at the end; no conversation is longer than `longest`."""

    lengths: tuple[int, ...]
    starts_N: torch.Tensor
    longest: int


def pack_lengths(lengths: Sequence[int], longest: int) -> PackedLengths:
    """The lengths as attention wants them, on the processor. `longest`: the most that any row's conversation may have."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    starts += [starts[-1]] * (-len(starts) % _ENDS_BUCKET)
    return PackedLengths(tuple(lengths), torch.tensor(starts, dtype=torch.int32), longest)


def forget_lengths(packed: PackedLengths) -> PackedLengths:
    """`packed` for a compiled layer, which would be compiled anew for every row that it is told the lengths of, and for every
    size of their tensor."""
    torch._dynamo.maybe_mark_dynamic(packed.starts_N, 0)
    return packed._replace(lengths=())


def check_dropout(config: Any) -> None:
    """Raise `TrainError` for a model that drops attention weights in training: a compiled layer attends by kernels, and those
    do not. `config`: transformers' own, of the whole model."""
    text = config.get_text_config()
    for name in ("attention_dropout", "attn_pdrop"):
        if share := getattr(text, name, None):
            raise TrainError(
                f"compile: true goes without dropout in attention, and the model's config.json has {name} {share}.",
                remedy=f"set {name} to 0 there, or compile: false",
            )


def register_attention() -> str:
    """Make the attention known to transformers; returns the name to give as `attn_implementation`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
    return ATTENTION


def packed_attention(
    module: Any,
    query_1HTE: torch.Tensor,
    key_1GTE: torch.Tensor,
    value_1GTE: torch.Tensor,
    attention_mask: Any,
    *,
    packed: PackedLengths | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention: (1, T, H, E) of what each token gathers, and no weights.

    Without `packed` the row is one conversation. `sliding_window`: tokens that one sees, itself among them. Raises `ValueError`
    for soft caps, which no kernel here knows.
    """
    if softcap:
        raise ValueError("packed attention has no soft caps")
    device, dtype = query_1HTE.device, query_1HTE.dtype
    if torch.is_autocast_enabled(device.type):
        # Autocast knows PyTorch's own attention; rotations in float32 leave it queries and keys of another dtype than values.
        dtype = torch.get_autocast_dtype(device.type)
    # To take the first of one by its number would have the gradient copied into a tensor of zeros.
    query_THE, key_TGE, value_TGE = (
        states.squeeze(0).transpose(0, 1).to(dtype) for states in (query_1HTE, key_1GTE, value_1GTE)
    )
    if attends_at_once(device, dtype) and not dropout:
        out_THE = _attend_at_once(query_THE, key_TGE, value_TGE, packed, scaling, sliding_window)
    else:
        lengths = packed.lengths if packed is not None else (query_THE.shape[0],)
        out_THE = _attend_in_turn(query_THE, key_TGE, value_TGE, lengths, scaling, sliding_window, dropout)
    return out_THE[None], None


def attends_at_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the variable-length kernels are used there; they have no dropout."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _has_kernels(device.index or 0)


def describe_attention(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Which kernels attend in a model of that `config` (transformers' own, of the whole model), for people to read."""
    if config._attn_implementation != ATTENTION:
        return f"transformers' own ({config._attn_implementation}), with a block mask"
    if not attends_at_once(device, dtype):
        return "scaled dot product, one conversation after another"
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if has_flash_attention(device.index or 0) and serves_width(width, device.index or 0):
        return "FlashAttention 4, a row at once"
    return "PyTorch's variable-length kernels, a row at once"


def _attend_at_once(
    query_THE: torch.Tensor,
    key_TGE: torch.Tensor,
    value_TGE: torch.Tensor,
    packed: PackedLengths | None,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    tokens, heads = query_THE.shape[:2]
    if packed is None:
        starts_N = pack_lengths((tokens,), tokens).starts_N.to(query_THE.device)
        packed = PackedLengths((tokens,), starts_N, tokens)
    width, device = query_THE.shape[2], query_THE.device.index or 0
    if has_flash_attention(device) and serves_width(width, device):
        # Two kinds of a layer would be compiled for a window that no conversation can reach past.
        window = sliding_window if sliding_window is not None and sliding_window < packed.longest else 0
        scale = scaling if scaling is not None else width**-0.5
        return flash_attend(query_THE, key_TGE, value_TGE, packed.starts_N, longest=packed.longest, scale=scale, window=window)
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": ((sliding_window or 0) - 1, 0), "scale": scaling}
    if _wants_to_know_of_groups():
        options["enable_gqa"] = heads != key_TGE.shape[1]
    attend: Callable[..., Any] = varlen_attn
    starts_N, longest = packed.starts_N, packed.longest
    out_THE: torch.Tensor = attend(query_THE, key_TGE, value_TGE, starts_N, starts_N, longest, longest, **options)
    return out_THE


def _attend_in_turn(
    query_THE: torch.Tensor,
    key_TGE: torch.Tensor,
    value_TGE: torch.Tensor,
    lengths: Sequence[int],
    scaling: float | None,
    sliding_window: int | None,
    dropout: float,
) -> torch.Tensor:
    outs_THE = []
    split: list[tuple[torch.Tensor, ...]] = [torch.split(states, list(lengths)) for states in (query_THE, key_TGE, value_TGE)]
    for query_tHE, key_tGE, value_tGE in zip(*split, strict=True):
        size = query_tHE.shape[0]
        mask_tt = None
        if sliding_window is not None and size > sliding_window:
            mask_tt = torch.ones(size, size, dtype=torch.bool, device=query_tHE.device).tril().triu(1 - sliding_window)
        out_1HtE = scaled_dot_product_attention(
            query_tHE.transpose(0, 1)[None],
            key_tGE.transpose(0, 1)[None],
            value_tGE.transpose(0, 1)[None],
            attn_mask=mask_tt,
            dropout_p=dropout,
            is_causal=mask_tt is None,
            scale=scaling,
            enable_gqa=query_tHE.shape[1] != key_tGE.shape[1],
        )
        outs_THE.append(out_1HtE[0].transpose(0, 1))
    return torch.cat(outs_THE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: int) -> bool:
    """Whether the variable-length kernels run there: from Ampere (8.0) on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _wants_to_know_of_groups() -> bool:
    """Older PyTorch takes fewer heads of keys without a word."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
