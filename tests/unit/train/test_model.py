"""Packed rows: conversations side by side lose what they lose alone, on three architectures."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from chaccu.conversation import Encoded
from chaccu.errors import TrainError
from chaccu.train.pack import PackedRow, pack_rows
from chaccu.train.recipe import DataSource, Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train.model import TrainableModel  # noqa: E402 (torch may be absent)

CPU = torch.device("cpu")
VOCAB, WINDOW = 97, 8
LENGTHS = (23, 5, 17, 11, 2)


def build_causal_lm(architecture: str) -> Any:
    wide = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    # Random weights come large, so that a conversation that saw another would lose something else by far.
    if architecture == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide, num_hidden_layers=2, initializer_range=0.3))
    if architecture == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return transformers.GPT2LMHeadModel(config)
    config = transformers.Gemma3TextConfig(
        **wide,
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
        query_pre_attn_scalar=8,
        final_logit_softcapping=5.0 if architecture == "gemma3-softcap" else None,
    )
    return transformers.Gemma3ForCausalLM(config)


def full_recipe(model: Path, **fields: Any) -> Recipe:
    return Recipe(
        model=str(model), data=[DataSource(path="none")], output="none", **{"method": "full", "precision": "fp32", **fields}
    )


def load_random(architecture: str, folder: Path) -> TrainableModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_causal_lm(architecture).save_pretrained(str(folder))
    return TrainableModel(full_recipe(folder), CPU)


def random_conversations() -> list[Encoded]:
    draw = random.Random(2)
    return [
        Encoded(
            [draw.randrange(VOCAB) for _ in range(length)], [1 if at == 1 else draw.randint(0, 1) for at in range(length)], ()
        )
        for length in LENGTHS
    ]


def gradients_of(model: TrainableModel, rows: list[PackedRow]) -> tuple[float, list[Any]]:
    total = sum(model.row_loss(row) for row in rows)
    return total.item(), list(torch.autograd.grad(total, model.parameters))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma3-softcap", "gpt2"])
def test_a_packed_row_loses_what_its_conversations_lose_alone(architecture: str, tmp_path: Path) -> None:
    model = load_random(architecture, tmp_path)
    conversations = random_conversations()
    (packed,) = pack_rows(conversations, sum(LENGTHS), seed=0)
    assert len(packed.ids_T) > WINDOW
    alone = [row for one in conversations for row in pack_rows([one], len(one.ids), seed=0)]
    packed_loss, packed_gradients = gradients_of(model, [packed])
    alone_loss, alone_gradients = gradients_of(model, alone)
    assert packed_loss == pytest.approx(alone_loss, rel=1e-5)
    torch.testing.assert_close(packed_gradients, alone_gradients, rtol=1e-3, atol=1e-3)
    # The comparison can fail: the same tokens as one conversation lose something else.
    joined = PackedRow(packed.ids_T, packed.mask_T, [len(packed.ids_T)])
    assert model.row_loss(joined).item() != pytest.approx(alone_loss, rel=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_row_loses_what_the_model_itself_says(architecture: str, tmp_path: Path) -> None:
    model = load_random(architecture, tmp_path)
    (row,) = pack_rows(random_conversations()[:1], 64, seed=0)
    labels = [token if trained else -100 for token, trained in zip(row.ids_T, row.mask_T, strict=True)]
    output = model.full(input_ids=torch.tensor([list(row.ids_T)]), labels=torch.tensor([labels]))
    assert model.row_loss(row).item() / row.trained_tokens == pytest.approx(output.loss.item(), rel=1e-5)


def test_lora_trains_adapters_alone_and_starts_where_the_base_is(llama: Path) -> None:
    row = pack_rows([Encoded(list(range(40)), [0, *[1] * 39], ())], 64, seed=0)[0]
    full = TrainableModel(full_recipe(llama), CPU)
    lora = TrainableModel(full_recipe(llama, method="lora"), CPU)
    assert lora.row_loss(row).item() == pytest.approx(full.row_loss(row).item(), rel=1e-6)
    assert 0 < sum(p.numel() for p in lora.parameters) < sum(p.numel() for p in full.parameters)
    assert all("lora_" in name for name, p in lora.full.named_parameters() if p.requires_grad)


def test_parameters_are_float32_even_when_computing_in_bfloat16(llama: Path) -> None:
    row = pack_rows([Encoded(list(range(40)), [0, *[1] * 39], ())], 64, seed=0)[0]
    exact = TrainableModel(full_recipe(llama), CPU).row_loss(row).item()
    for method in ("full", "lora"):
        model = TrainableModel(full_recipe(llama, method=method, precision="bf16"), CPU)
        assert {parameter.dtype for parameter in model.parameters} == {torch.float32}
        loss = model.row_loss(row)
        assert loss.item() == pytest.approx(exact, rel=0.02)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in torch.autograd.grad(loss, model.parameters))


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    config = transformers.CohereConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        logit_scale=0.0625,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.CohereForCausalLM(config).save_pretrained(str(tmp_path))
    with pytest.raises(TrainError, match="CohereForCausalLM"):
        TrainableModel(full_recipe(tmp_path), CPU)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nowhere"):
        TrainableModel(full_recipe(tmp_path / "nowhere"), CPU)
