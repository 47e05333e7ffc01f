"""An adapter's layer in few kernels computes what peft's own does, on every kind of base layer."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402 (torch may be absent)
from transformers.pytorch_utils import Conv1D  # noqa: E402 (torch may be absent)

from chaccu.train.adapted_linear import AdaptedLinear, adopt_adapters  # noqa: E402 (torch may be absent)
from chaccu.train.nf4 import pack_linear  # noqa: E402 (torch may be absent)

WIDTH_IN, WIDTH_OUT, RANK, TOKENS = 64, 128, 4, 24


def build_base(kind: str) -> Any:
    if kind == "conv1d":
        return Conv1D(WIDTH_OUT, WIDTH_IN)
    dense = torch.nn.Linear(WIDTH_IN, WIDTH_OUT, bias=kind == "biased")
    if kind != "nf4":
        return dense
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return pack_linear(dense.weight.detach(), torch.nn.Parameter(torch.randn(WIDTH_OUT)))


def build_adapted(kind: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.layer = build_base(kind)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3 * RANK, lora_dropout=dropout, target_modules=["layer"], fan_in_fan_out=kind == "conv1d"
    )
    adapted = peft.LoraModel(net, config, "default")
    torch.nn.init.normal_(net.layer.lora_B["default"].weight, std=0.2)
    adopt_adapters(adapted)
    assert type(net.layer) is AdaptedLinear
    return net.layer


def gradients_of(layer: Any, forward: Any, autocast: bool) -> list[Any]:
    """What `forward` gives and the gradients by input, A and B."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, TOKENS, WIDTH_IN, generator=generator).requires_grad_()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = forward(inputs)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    pull = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad(out, [inputs, *trained], pull.to(out.dtype))]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["plain", "biased", "conv1d", "nf4"])
def test_it_computes_what_peft_computes(kind: str, autocast: bool, dropout: float) -> None:
    layer = build_adapted(kind, dropout)
    ours = gradients_of(layer, layer, autocast)
    theirs = gradients_of(layer, lambda inputs: peft.tuners.lora.Linear.forward(layer, inputs), autocast)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        # Of the largest value: sums are rounded in another order.
        torch.testing.assert_close(one, other, rtol=0, atol=(2e-2 if autocast else 1e-5) * float(other.detach().abs().max()))


@pytest.mark.parametrize("kind", ["plain", "conv1d", "nf4"])
def test_compiled_it_is_one_graph_of_the_same_values(kind: str) -> None:
    layer = build_adapted(kind)
    compiled = torch.compile(lambda inputs: layer(inputs), backend="aot_eager", fullgraph=True)
    for one, other in zip(gradients_of(layer, compiled, False), gradients_of(layer, layer, False), strict=True):
        torch.testing.assert_close(one, other)


def test_it_keeps_the_input_and_what_is_as_narrow_as_the_rank() -> None:
    layer, kept = build_adapted("plain"), []
    inputs = torch.randn(1, TOKENS, WIDTH_IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(tuple(one.shape)) or one, lambda one: one):
        layer(inputs)
    assert sorted(kept) == sorted([(TOKENS, WIDTH_IN), (TOKENS, RANK), (RANK, WIDTH_IN), (WIDTH_OUT, RANK)])


class Wide(TorchDispatchMode):
    """Counts operators that write a tensor of the input's or the output's size."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, torch.Tensor) and out.numel() >= TOKENS * WIDTH_IN and not func.is_view and name != "_unsafe_view":
            self.names.append(name)
        return out


def test_only_products_write_tensors_as_large_as_input_and_output() -> None:
    layer = build_adapted("plain")
    inputs, pull = torch.randn(1, TOKENS, WIDTH_IN, requires_grad=True), torch.randn(1, TOKENS, WIDTH_OUT)
    with Wide() as wide:
        torch.autograd.grad(layer(inputs), [inputs], pull)
    assert sorted(wide.names) == ["addmm_", "addmm_", "mm", "mm"]


def test_a_merged_or_disabled_adapter_is_peft_s_own_affair() -> None:
    layer = build_adapted("biased")
    inputs = torch.randn(1, TOKENS, WIDTH_IN)
    with torch.no_grad():
        adapted = layer(inputs)
        layer.enable_adapters(False)
        torch.testing.assert_close(layer(inputs), layer.base_layer(inputs))
        layer.enable_adapters(True)
        layer.merge()
        torch.testing.assert_close(layer(inputs), adapted)


def test_a_base_layer_of_another_kind_stays_with_peft() -> None:
    class Odd(torch.nn.Linear):
        pass

    net = torch.nn.Module()
    net.layer = Odd(WIDTH_IN, WIDTH_OUT)
    adopt_adapters(peft.LoraModel(net, peft.LoraConfig(r=RANK, target_modules=["layer"]), "default"))
    assert type(net.layer) is peft.tuners.lora.Linear
    assert not net.layer.cast_input_dtype_enabled
