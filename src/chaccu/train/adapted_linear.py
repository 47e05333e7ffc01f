"""A frozen linear layer and its adapter as one product: y = x·Wᵀ + b + scale·x·Aᵀ·Bᵀ, in the computation's precision.

peft's own forward multiplies and adds tensors of the output's size, and autograd adds two gradients by the input for each
layer. Here the scale is applied where the tensor is as narrow as the rank, and the adapter's products are added into what the
base has written, forward and backward. For the compiler the same is written in plain operations, which it fuses by itself.

Invariants: modules, parameters and their names are peft's, so it saves and loads them; adapters stay float32, and only their
products are made in 16 bits; W gets no gradient. It ignores what training does not use: several adapters, merged ones,
variants.

Tensor names: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from chaccu.train.nf4 import NF4Linear

_ADAPTER = "default"


class AdaptedLinear(Linear):
    """peft's layer of an adapter with another forward; a layer of peft becomes one by `adopt_adapters`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's, up to the order of sums and roundings."""
        if self.disable_adapters or self.merged:
            plain: torch.Tensor = super().forward(x, *args, **kwargs)
            return plain
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(dtype)
        adapter: tuple[Any, Any] = self.lora_A[_ADAPTER], self.lora_B[_ADAPTER]
        a_RI, b_OR = (one.weight for one in adapter)
        scale, dropout = self.scaling[_ADAPTER], self.lora_dropout[_ADAPTER]
        drops = self.training and not isinstance(dropout, torch.nn.Identity)
        if drops or torch.compiler.is_compiling():
            low = linear(dropout(x), a_RI.to(dtype)) * scale
            written: torch.Tensor = self.base_layer(x) + linear(low, b_OR.to(dtype))
            return written
        out: torch.Tensor = _Adapted.apply(x, a_RI, b_OR, scale, self.base_layer)  # type: ignore[no-untyped-call]
        return out


class _Adapted(torch.autograd.Function):
    """The layer without dropout, of which only x and x·Aᵀ are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float, base: torch.nn.Module
    ) -> torch.Tensor:
        a_RI, b_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
        out: torch.Tensor = base(x)
        x_TI = x.flatten(0, -2)
        low_TR = (x_TI @ a_RI.T).mul_(scale)
        out.view(-1, out.shape[-1]).addmm_(low_TR, b_OR.T)
        ctx.save_for_backward(x_TI, low_TR, a_RI, b_OR)
        ctx.scale, ctx.base = scale, base
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, low_TR, a_RI, b_OR = ctx.saved_tensors
        grad_TO = grad.flatten(0, -2)
        low_grad_TR = (grad_TO @ b_OR).mul_(ctx.scale)
        by_a_RI, by_b_OR = (low_grad_TR.T @ x_TI).float(), (grad_TO.T @ low_TR).float()
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = _multiply_back(ctx.base, grad_TO).addmm_(low_grad_TR, a_RI).view(*grad.shape[:-1], -1)
        return by_x, by_a_RI, by_b_OR, None, None


def _multiply_back(base: torch.nn.Module, grad_TO: torch.Tensor) -> torch.Tensor:
    """The gradient by the input of a base layer."""
    if isinstance(base, NF4Linear):
        return base.multiply_back(grad_TO)
    weight: Any = base.weight
    weight_OI = weight.T if isinstance(base, Conv1D) else weight
    grad_TI: torch.Tensor = grad_TO @ weight_OI.to(grad_TO.dtype)
    return grad_TI


def adopt_adapters(model: torch.nn.Module) -> None:
    """Let peft's layers in `model` compute as `AdaptedLinear` where their base is one that this knows."""
    module: Any
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Autocast chooses the dtype; peft would first copy every input into the adapter's float32, for each layer anew.
            module.cast_input_dtype_enabled = False
            known = type(module.get_base_layer()) in (torch.nn.Linear, Conv1D, NF4Linear)
            if type(module) is Linear and known and not module.lora_variant:
                module.__class__ = AdaptedLinear
