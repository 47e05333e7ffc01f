"""Compiled layers: one graph serves them all, whatever the rows hold. The kernels are stood in for by plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.errors import TrainError
from chaccu.train.pack import PackedRow
from chaccu.train.recipe import DataSource, LoraOptions, Recipe
from chaccu.train.token_rows import TokenRowPlan

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train import attention, model  # noqa: E402 (torch may be absent)
from chaccu.train.model import TrainableModel  # noqa: E402 (torch may be absent)

CPU = torch.device("cpu")
ROWS = [PackedRow([*range(1, 60)], [1] * 59, lengths) for lengths in ([30, 29], [20, 39], [2] * 29 + [1], [1] * 19 + [2] * 20)]


def attend_plainly(query: Any, key: Any, value: Any, packed: Any, scaling: Any, window: Any) -> Any:
    starts_N = torch.tensor([0, len(query)]) if packed is None else packed.starts_N
    owner = torch.bucketize(torch.arange(len(query)), starts_N[1:], right=True)
    gap = torch.arange(len(query))[:, None] - torch.arange(len(query))
    seen = (owner[:, None] == owner) & (gap >= 0)
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    scores = torch.einsum("qhe,khe->hqk", query, key) * (scaling or query.shape[2] ** -0.5)
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are compiled; and attention at once, on the processor."""
    made: list[Any] = []

    def compile_plainly(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    really = torch.compile
    torch._dynamo.reset()
    for module in (attention, model):
        monkeypatch.setattr(module, "attends_at_once", lambda *_: True)
    monkeypatch.setattr(attention, "_attend_at_once", attend_plainly)
    monkeypatch.setattr(torch, "compile", lambda call, **options: really(call, **{"backend": compile_plainly, **options}))
    return made


def build_causal_lm(architecture: str, layers: int, **fields: Any) -> Any:
    torch.manual_seed(0)
    if architecture == "gpt2":
        fields = {"attn_pdrop": 0.0, **fields}
        config = transformers.GPT2Config(
            vocab_size=97, n_positions=64, n_embd=64, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0, **fields
        )
        return transformers.GPT2LMHeadModel(config)
    wide = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide, num_hidden_layers=layers, **fields))


def build_recipe(folder: Path, **fields: Any) -> Recipe:
    return msgspec.structs.replace(
        Recipe(model=str(folder), data=[DataSource(path="none")], output="none", method="lora", sequence_len=64),
        **{"compile": True, "precision": "bf16", **fields},
    )


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {"method": "full"}),
        ("llama", {"method": "lora"}),
        ("llama", {"method": "lora", "lora": LoraOptions(dropout=0.1), "activation_checkpointing": "full"}),
        ("gpt2", {"method": "lora"}),
        ("llama", {"method": "qlora"}),
    ],
)
def test_one_graph_serves_all_layers_and_all_rows(
    tmp_path: Path, graphs: list[Any], architecture: str, fields: dict[str, Any], layers: int
) -> None:
    if fields["method"] == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    build_causal_lm(architecture, layers).save_pretrained(str(tmp_path))
    trained = TrainableModel(build_recipe(tmp_path, **fields), CPU)
    for row in ROWS:
        trained.row_loss(row).backward()
    assert len(graphs) == 1


def test_compiled_adapters_get_the_gradients_of_uncompiled_ones(tmp_path: Path, graphs: list[Any]) -> None:
    build_causal_lm("llama", 3).save_pretrained(str(tmp_path))
    found = []
    for compiled in (True, False):
        recipe = build_recipe(tmp_path, compile=compiled, precision="fp32")
        trained = TrainableModel(recipe, CPU, TokenRowPlan(candidates=(5, 7), always=True))
        assert trained.token_rows == [5, 7]
        loss = trained.row_loss(ROWS[0])
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in trained.parameters)])
    assert len(graphs) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("architecture", "name"), [("gpt2", "attn_pdrop"), ("llama", "attention_dropout")])
def test_dropout_in_attention_is_refused(tmp_path: Path, architecture: str, name: str) -> None:
    build_causal_lm(architecture, 2, **{name: 0.1}).save_pretrained(str(tmp_path))
    with pytest.raises(TrainError, match=f"{name} 0.1") as caught:
        TrainableModel(build_recipe(tmp_path), CPU)
    assert "compile: false" in caught.value.remedy
    TrainableModel(build_recipe(tmp_path, compile=False), CPU)
