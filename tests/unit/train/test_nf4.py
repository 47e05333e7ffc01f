"""A base in 4 bits: what its layers compute, what they keep, and adapters trained on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.artifact import read_manifest
from chaccu.errors import MissingDependencyError, TrainError
from chaccu.train.pack import pack_rows
from chaccu.train.recipe import Recipe
from chaccu.weights.merge import merge_adapter

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from test_model import (  # noqa: E402 (torch may be absent)
    CPU,
    LENGTHS,
    build_causal_lm,
    full_recipe,
    gradients_of,
    random_conversations,
)

from chaccu.train.model import TrainableModel  # noqa: E402 (torch may be absent)
from chaccu.train.nf4 import NF4Linear, adopt_packed_layers, pack_linear, packed_layers  # noqa: E402 (torch may be absent)
from chaccu.train.run import train  # noqa: E402 (torch may be absent)

# The 16 levels of NormalFloat4 (Dettmers et al. 2023, appendix E), to seven digits.
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    return msgspec.convert({**msgspec.to_builtins(recipe), **fields}, Recipe)


def save_base(architecture: str, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_causal_lm(architecture).save_pretrained(str(folder))
    return folder


def random_layer(outputs: int = 96, inputs: int = 256) -> tuple[torch.Tensor, NF4Linear]:
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3))
    bias = torch.nn.Parameter(torch.linspace(-1, 1, outputs), requires_grad=False)
    return weight_OI, pack_linear(weight_OI, bias)


def test_every_weight_becomes_the_nearest_level_of_its_block() -> None:
    weight_OI, layer = random_layer()
    blocks_B64 = weight_OI.reshape(-1, 64)
    largest_B1 = blocks_B64.abs().amax(dim=1, keepdim=True)
    nearest = (blocks_B64[..., None] / largest_B1[..., None] - torch.tensor(NF4)).abs().argmin(-1)
    wanted_OI = (torch.tensor(NF4)[nearest] * largest_B1).reshape(weight_OI.shape)
    # What is left is the rounding of the scales to 8 bits.
    torch.testing.assert_close(layer.dequantise(torch.float32), wanted_OI, rtol=0.02, atol=0.0)
    assert (wanted_OI - weight_OI).abs().max() > 0.1


def test_a_packed_layer_takes_half_a_byte_a_weight_and_a_scale_of_8_bits_a_block() -> None:
    outputs, inputs = 512, 1024
    layer = pack_linear(torch.randn(outputs, inputs).bfloat16())
    weights = outputs * inputs
    # 256 levels and an offset are there once a layer.
    assert layer.nbytes == weights // 2 + weights // 64 + 4 * weights // (64 * 256) + 4 * 256 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_layer_multiplies_with_the_weight_that_it_unpacks(dtype: torch.dtype) -> None:
    _, layer = random_layer()
    plain = torch.nn.Linear(256, 96).to(dtype)
    plain.weight.data, plain.bias.data = layer.dequantise(dtype), layer.bias.data.to(dtype)
    ours_TI = torch.randn(7, 256).to(dtype).requires_grad_()
    theirs_TI = ours_TI.detach().clone().requires_grad_()
    ours_TO, theirs_TO = layer(ours_TI), plain(theirs_TI)
    near = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours_TO, theirs_TO, rtol=near, atol=near)
    ours_TO.square().sum().backward()
    theirs_TO.square().sum().backward()
    torch.testing.assert_close(ours_TI.grad, theirs_TI.grad, rtol=near, atol=100 * near)


def test_nothing_but_the_packed_weight_is_kept_for_the_backward_pass_compiled_or_not() -> None:
    _, layer = random_layer()
    packed = {tensor.data_ptr() for tensor in (layer.weight, layer.scales, layer.groups, layer.levels, layer.offset)}
    compiled = torch.compile(lambda states: layer(layer(states).repeat(1, 3)[:, :256]), fullgraph=True, backend="aot_eager")
    for run in (layer, compiled):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda one: one):
            run(torch.randn(5, 256, requires_grad=True)).sum().backward()
        assert {tensor.data_ptr() for tensor in kept} == packed


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_packed_rows_on_a_4_bit_base_lose_what_their_conversations_lose_alone(architecture: str, tmp_path: Path) -> None:
    model = TrainableModel(full_recipe(save_base(architecture, tmp_path), method="qlora"), CPU)
    conversations = random_conversations()
    alone = [row for one in conversations for row in pack_rows([one], len(one.ids), seed=0)]
    packed_loss, packed_gradients = gradients_of(model, pack_rows(conversations, sum(LENGTHS), seed=0))
    alone_loss, alone_gradients = gradients_of(model, alone)
    assert packed_loss == pytest.approx(alone_loss, rel=1e-5)
    torch.testing.assert_close(packed_gradients, alone_gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_an_adapter_on_a_4_bit_base_learns_as_on_the_weights_it_stands_for(architecture: str, tmp_path: Path) -> None:
    base = save_base(architecture, tmp_path / "base")
    packed = TrainableModel(full_recipe(base, method="qlora", activation_checkpointing="full"), CPU)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    layers = {name: layer for name, layer in packed.full.named_modules() if isinstance(layer, NF4Linear)}
    assert layers
    for name, layer in layers.items():
        weight = plain.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer")).weight
        unpacked_OI = layer.dequantise(torch.float32)
        weight.data = unpacked_OI.T.contiguous() if layer.from_conv1d else unpacked_OI
    plain.save_pretrained(tmp_path / "unpacked")
    lora = TrainableModel(full_recipe(tmp_path / "unpacked", method="lora"), CPU)
    for ours, theirs in zip(packed.parameters, lora.parameters, strict=True):
        theirs.data = ours.data.normal_(std=0.1, generator=torch.Generator().manual_seed(ours.numel())).clone()
    rows = pack_rows(random_conversations(), sum(LENGTHS), seed=0)
    packed_loss, packed_gradients = gradients_of(packed, rows)
    lora_loss, lora_gradients = gradients_of(lora, rows)
    assert packed_loss == pytest.approx(lora_loss, rel=1e-5)
    torch.testing.assert_close(packed_gradients, lora_gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_qlora_learns_and_its_adapter_serves_on_the_16_bit_base(recipe: Recipe, tmp_path: Path, precision: str) -> None:
    recipe = changed(recipe, method="qlora", precision=precision, lora={"trainable_tokens": ["<|im_end|>"]})
    report = train(recipe)
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.loss_after < 0.9 * report.loss_before
    assert report.token_rows == ["<|im_end|>"]
    manifest = read_manifest(Path(recipe.output), kind="adapter")
    assert manifest.facts["packing"].startswith("nf4 with double quantisation, 14 layers, ")
    assert manifest.settings["method"] == "qlora"
    assert "bitsandbytes" in manifest.versions
    ids = torch.arange(8)[None]
    base = transformers.AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, recipe.output).eval()
    merge_adapter(Path(recipe.model), Path(recipe.output), tmp_path / "merged")
    merged = TrainableModel(changed(recipe, model=str(tmp_path / "merged"), method="full", precision="fp32"), CPU)
    with torch.no_grad():
        torch.testing.assert_close(merged.full(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-3)
    again = train(
        changed(recipe, model=str(tmp_path / "merged"), output=str(tmp_path / "again"), max_steps=1, learning_rate=1e-9)
    )
    assert again.loss_before == pytest.approx(report.loss_after, rel=0.1)


def test_an_adapter_of_a_packed_conv1d_fits_the_conv1d(tmp_path: Path) -> None:
    base = save_base("gpt2", tmp_path / "base")
    model = TrainableModel(full_recipe(base, method="qlora"), CPU)
    for parameter in model.parameters:
        parameter.data.normal_(std=0.1)
    model.full.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(16)[None]
    expected = model.full.eval()(ids).logits
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    for wrapped in adapted.modules():
        if isinstance(wrapped, peft.tuners.lora.LoraLayer):
            packed_OI = pack_linear(wrapped.get_base_layer().weight.detach().T).dequantise(torch.float32)
            wrapped.get_base_layer().weight.data = packed_OI.T.contiguous()
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_base_saved_in_4_bits_is_taken_as_it_is(llama: Path, tmp_path: Path) -> None:
    saved = transformers.AutoModelForCausalLM.from_pretrained(
        llama,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    saved.save_pretrained(tmp_path)
    packed = [TrainableModel(full_recipe(base, method="qlora"), CPU) for base in (llama, tmp_path)]
    weights = [[layer.dequantise(torch.float32) for layer in packed_layers(model.full)] for model in packed]
    assert len(weights[0]) == 14
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_other_kinds_of_quantisation_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TrainError, match="gptq"):
        TrainableModel(full_recipe(tmp_path, method="qlora"), CPU)
    packed, state = bitsandbytes.functional.quantize_4bit(torch.randn(64, 64), quant_type="fp4", compress_statistics=True)
    with pytest.raises(TrainError, match="fp4 with double"):
        NF4Linear(packed, state, None)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(TrainError, match="no linear layers"):
        adopt_packed_layers(torch.nn.Sequential(torch.nn.Embedding(4, 4)))


def test_without_bitsandbytes_the_extra_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match="bitsandbytes") as raised:
        TrainableModel(full_recipe(llama, method="qlora"), CPU)
    assert "chaccu[gpu]" in raised.value.remedy
