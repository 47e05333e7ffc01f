"""Linear layers whose frozen weight lies in four bits, for adapters to be trained on (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314).

bitsandbytes packs: NormalFloat4 codes, two a byte, in blocks of 64 weights; each block's scale is kept in 8 bits, and 256 of
those share one in 32 bits (double quantisation): 4.127 bits a weight. Rows of thousands of tokens are multiplied fastest by
PyTorch's 16-bit products, so a layer unpacks its weight, multiplies and drops it, once forward and once backward.

Invariants: nothing but the packed weight outlives a product, compiled or not, since to autograd and to the compiler a layer is
one operation; the weight gets no gradient. bitsandbytes' own layer is not used: on some processors it repacks its weight when
it is asked without gradients.

Tensor names: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from chaccu.errors import MissingDependencyError, TrainError


class NF4Linear(torch.nn.Linear):
    """y = x·Wᵀ + b with a packed W that does not change.

    `weight`: the codes (uint8, O·I / 2 bytes); `scales`: of the blocks (uint8); `groups`, `offset`, `levels`: what `scales`
    stand for, `levels[scale]·group + offset` (float32). `from_conv1d`: it was a `Conv1D`, whose weight is stored as I × O.
    """

    scales: torch.Tensor
    groups: torch.Tensor
    levels: torch.Tensor
    offset: torch.Tensor

    def __init__(self, packed: torch.Tensor, state: Any, bias: torch.nn.Parameter | None, *, from_conv1d: bool = False) -> None:
        """Take what `bitsandbytes.functional.quantize_4bit` gave for a weight of O × I. Raises `TrainError` for another kind of
        four bits than NF4 with double quantisation."""
        if state.quant_type != "nf4" or not state.nested:
            found = f"{state.quant_type} {'with' if state.nested else 'without'} double quantisation"
            raise TrainError(f"a weight of the base is in 4 bits as {found}.", remedy="use nf4 with it, or a 16-bit base")
        out_features, in_features = state.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = torch.nn.Parameter(packed.data.view(torch.uint8), requires_grad=False)
        self.register_parameter("bias", bias)
        self.block, self.group = int(state.blocksize), int(state.state2.blocksize)
        self.from_conv1d = from_conv1d
        self.register_buffer("scales", state.absmax, persistent=False)
        self.register_buffer("groups", state.state2.absmax, persistent=False)
        self.register_buffer("levels", state.state2.code, persistent=False)
        self.register_buffer("offset", state.offset, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight takes, without a bias."""
        tensors = (self.weight, self.scales, self.groups, self.levels, self.offset)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the layer multiplies with, O × I in `dtype`."""
        return _unpack(dtype, *self._packed())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        out: torch.Tensor = _multiply(input.to(dtype), *self._packed())
        return out if self.bias is None else out + self.bias.to(dtype)

    def multiply_back(self, grad_TO: torch.Tensor) -> torch.Tensor:
        """The gradient by the input, from that by the output."""
        grad_TI: torch.Tensor = _multiply_back(grad_TO, *self._packed())
        return grad_TI

    def _packed(self) -> tuple[Any, ...]:
        sizes = [self.out_features, self.in_features]
        return self.weight, self.scales, self.groups, self.levels, self.offset, sizes, self.block, self.group


def pack_linear(weight_OI: torch.Tensor, bias: torch.nn.Parameter | None = None) -> NF4Linear:
    """A packed layer of a weight, on its device. Raises `MissingDependencyError` without bitsandbytes."""
    packed, state = _bitsandbytes().functional.quantize_4bit(
        weight_OI.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return NF4Linear(packed, state, bias)


def packed_layers(model: torch.nn.Module) -> list[NF4Linear]:
    """The packed layers of a model."""
    return [module for module in model.modules() if isinstance(module, NF4Linear)]


def describe_packing(model: torch.nn.Module) -> str | None:
    """How a model's base is packed, for people; None when it is not."""
    layers = packed_layers(model)
    if not layers:
        return None
    bits = 8 * sum(layer.nbytes for layer in layers) / sum(layer.in_features * layer.out_features for layer in layers)
    return f"nf4 with double quantisation, {len(layers)} layers, {bits:.3f} bits a weight"


def loading_options(config: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What to tell transformers so that it packs each linear weight on `device` as it is read: neither the device nor the host
    holds the whole model in 16 bits.

    `config`: the base's; one that lies in 4 bits already is read as it is. Raises `MissingDependencyError`, and `TrainError`
    for a base that is quantised otherwise.
    """
    _bitsandbytes()
    import transformers

    there = getattr(config, "quantization_config", None) or {}
    there = there if isinstance(there, dict) else there.to_dict()
    if there and not (there.get("quant_method") == "bitsandbytes" and there.get("load_in_4bit")):
        raise TrainError(
            f"method: qlora packs the base itself, and this base is quantised already: {there.get('quant_method', 'unknown')}.",
            remedy="use the 16-bit base, or one in bitsandbytes' nf4",
        )
    if there:
        return {"device_map": {"": device}}
    four_bits = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": four_bits, "device_map": {"": device}}


def adopt_packed_layers(causal: Any) -> None:
    """Put `NF4Linear` in the place of the layers that transformers packed; they share their tensors.

    Embedding and output projection stay as they are. Raises `TrainError` when nothing was packed.
    """
    from transformers.pytorch_utils import Conv1D

    linear4bit = _bitsandbytes().nn.Linear4bit
    found = [(name, module) for name, module in causal.named_modules() if isinstance(module, linear4bit)]
    if not found:
        raise TrainError(
            f"{type(causal).__name__} has no linear layers that could be packed into 4 bits.", remedy="set method: lora"
        )
    for name, module in found:
        from_conv1d = getattr(module, "source_cls", None) is Conv1D
        layer = NF4Linear(module.weight, module.weight.quant_state, module.bias, from_conv1d=from_conv1d)
        causal.set_submodule(name, layer)
    # It is no longer a model that transformers or peft know how to treat as quantised.
    causal.hf_quantizer.remove_quantization_config(causal)
    causal.is_loaded_in_4bit = False


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingDependencyError("bitsandbytes", extra="gpu", needed_for="method: qlora") from error
    return bitsandbytes


def _unpack(
    dtype: torch.dtype,
    weight: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    levels: torch.Tensor,
    offset: torch.Tensor,
    sizes: list[int],
    block: int,
    group: int,
) -> torch.Tensor:
    kernels = torch.ops.bitsandbytes
    absmax = kernels.dequantize_blockwise.default(scales, groups, levels, group, torch.float32) + offset
    weight_OI: torch.Tensor = kernels.dequantize_4bit.default(weight, absmax, block, "nf4", sizes, dtype)
    return weight_OI


@torch.library.custom_op("chaccu::nf4_linear", mutates_args=())
def _multiply(
    input_TI: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    levels: torch.Tensor,
    offset: torch.Tensor,
    sizes: list[int],
    block: int,
    group: int,
) -> torch.Tensor:
    """x·Wᵀ over the last dimension of x, in x's dtype."""
    weight_OI = _unpack(input_TI.dtype, weight, scales, groups, levels, offset, sizes, block, group)
    return torch.nn.functional.linear(input_TI, weight_OI)


@torch.library.custom_op("chaccu::nf4_linear_backward", mutates_args=())
def _multiply_back(
    grad_TO: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    levels: torch.Tensor,
    offset: torch.Tensor,
    sizes: list[int],
    block: int,
    group: int,
) -> torch.Tensor:
    """The gradient by x: that by y, times W."""
    weight_OI = _unpack(grad_TO.dtype, weight, scales, groups, levels, offset, sizes, block, group)
    return grad_TO @ weight_OI


@_multiply.register_fake
def _(input_TI: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return input_TI.new_empty((*input_TI.shape[:-1], rest[4][0]))


@_multiply_back.register_fake
def _(grad_TO: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return grad_TO.new_empty((*grad_TO.shape[:-1], rest[4][1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.sizes = inputs[6:]


def _differentiate(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_TI = _multiply_back(grad_TO, *ctx.saved_tensors, *ctx.sizes)
    return (grad_TI, *[None] * 8)


_multiply.register_autograd(_differentiate, setup_context=_keep)
