"""Every shipped recipe trains two steps on a tiny model of its architecture, with its lengths scaled down."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.conversation import Conversation, Message, list_formats
from chaccu.testing.tiny import build_model
from chaccu.train.batch import accumulation_steps
from chaccu.train.memory import ModelShape, estimate_memory
from chaccu.train.recipe import DataSource, Recipe, list_recipes, load_recipe, read_fields

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from chaccu.train.out_of_memory import read_shape  # noqa: E402
from chaccu.train.run import train  # noqa: E402 (torch may be absent)

# By the beginning of a base's name: the architecture, and how many positions it knows.
BASES = {
    "huggyllama/llama": ("llama", 2048),
    "meta-llama/Llama-2": ("llama", 4096),
    "distilbert/distilgpt2": ("distilgpt2", 1024),
    "runs/demo/base": ("gemma-3", 32768),
}
SHORTEST = 256
# What a machine that the recipe names has for it, in bytes.
ROOM = {
    "distilgpt2": 4e9,
    "quickstart-cpu": 4e9,
    "gemma-270m": 8e9,
    "gemma-270m-lora": 24e9,
    "vicuna-7b": 80e9,
    "vicuna-7b-16k": 80e9,
    "vicuna-13b": 80e9,
    "vicuna-13b-1gpu": 80e9,
    "vicuna-13b-qlora-16gb": 15e9,
    "vicuna-7b-t4": 15e9,
}


def base_of(recipe: Recipe) -> tuple[str, int]:
    (found,) = [base for name, base in BASES.items() if recipe.model.startswith(name)]
    return found


def scale_down(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe over a tiny model and a few conversations: lengths divided by one number, and what needs a GPU left out."""
    architecture, positions = base_of(recipe)
    by = max(1, recipe.sequence_len // SHORTEST)
    length = {"n_positions" if architecture == "distilgpt2" else "max_position_embeddings": positions // by}
    base = build_model(folder / "base", architecture, chat_format=recipe.format or "gemma-3", **length)
    path = folder / "talk.jsonl"
    talk = [
        Conversation(
            messages=(Message("user", f"What is {one} and {one}? " * 3), Message("assistant", f"It is {2 * one}. " * 9)),
            id=str(one),
        )
        for one in range(220)
    ]
    path.write_bytes(b"\n".join(map(msgspec.json.encode, talk)))
    row_len = recipe.row_len // by
    fields: dict[str, Any] = {
        "model": str(base),
        "output": str(folder / "out"),
        "data": [DataSource(path=str(path), max_tokens=recipe.sequence_len // by)],
        "validation": [DataSource(path=str(path), conversations=5)],
        "sequence_len": recipe.sequence_len // by,
        "micro_batch_tokens": row_len,
        "processes": 1,
        # Two rows to a step, where the recipe has several.
        "gradient_accumulation_steps": min(2, recipe.gradient_accumulation_steps),
        "global_batch_size": None,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "num_train_epochs": 3,
        "compile": False,
        "precision": "fp32" if recipe.precision in ("fp16", "fp8") else recipe.precision,
    }
    return msgspec.structs.replace(recipe, **fields)


@pytest.mark.parametrize("name", list_recipes())
def test_a_shipped_recipe_trains_two_steps_in_little(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(Path(name))
    if recipe.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("method: qlora needs bitsandbytes, which is not installed")
    report = train(scale_down(recipe, tmp_path))
    assert report.steps == 2
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.loss_after < report.loss_before
    trained = tmp_path / "out" / ("model.safetensors" if recipe.method == "full" else "adapter_model.safetensors")
    weights = safetensors.load_file(str(trained))
    if recipe.method == "full":
        base = safetensors.load_file(str(tmp_path / "base" / "model.safetensors"))
        assert all((weights[key].float() != base[key].float()).any() for key in base if base[key].ndim > 1)
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        assert config.max_position_embeddings >= report_length(recipe)
    else:
        assert all(weight.any() for key, weight in weights.items() if "lora_B" in key)


def report_length(recipe: Recipe) -> int:
    return recipe.sequence_len // max(1, recipe.sequence_len // SHORTEST)


@pytest.mark.parametrize("name", list_recipes())
def test_a_shipped_recipe_reaches_no_further_than_its_base_and_names_a_format(name: str) -> None:
    recipe = load_recipe(Path(name))
    _, positions = base_of(recipe)
    assert recipe.sequence_len <= positions * (recipe.rope_scaling.factor if recipe.rope_scaling else 1)
    # The demo's base names its own.
    assert recipe.format in list_formats() or (recipe.format is None and recipe.model == "runs/demo/base")


@pytest.mark.parametrize("name", list_recipes())
def test_a_step_of_a_shipped_recipe_is_as_large_on_one_process(name: str) -> None:
    recipe = load_recipe(Path(name))
    if recipe.global_batch_size is None:
        return
    rows = recipe.gradient_accumulation_steps * recipe.processes
    assert rows * recipe.row_len == recipe.global_batch_size * recipe.sequence_len
    assert accumulation_steps(recipe, 1) == rows


def shape_of(model: str) -> ModelShape:
    """The base's real shape, by what its makers published."""
    if "distilgpt2" in model:
        return read_shape(transformers.GPT2Config(n_layer=6))
    if "demo" in model:
        small = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4}
        return read_shape(transformers.Gemma3TextConfig(**small, vocab_size=262144, num_key_value_heads=1, head_dim=256))
    width, layers, heads, inner = (5120, 40, 40, 13824) if "13b" in model else (4096, 32, 32, 11008)
    return read_shape(
        transformers.LlamaConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner, vocab_size=32000
        )
    )


@pytest.mark.parametrize("name", list_recipes())
def test_a_shipped_recipe_fits_the_machine_that_it_names(name: str) -> None:
    recipe = load_recipe(Path(name))
    estimate = estimate_memory(recipe, shape_of(recipe.model), half=name not in ("distilgpt2", "quickstart-cpu"))
    assert 0.25 * ROOM[name] < estimate.peak_bytes < 0.95 * ROOM[name]


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("vicuna")])
def test_vicuna_s_own_hyperparameters_are_kept(name: str) -> None:
    recipe = load_recipe(Path(name))
    assert (recipe.lr_scheduler, recipe.warmup_ratio, recipe.weight_decay) == ("cosine", 0.03, 0.0)
    if recipe.method == "full" and recipe.global_batch_size is not None:
        assert recipe.global_batch_size * recipe.sequence_len == 128 * 2048
        assert (recipe.learning_rate, recipe.num_train_epochs) == (2e-5, 3)


@pytest.mark.parametrize("name", list_recipes())
def test_a_shipped_recipe_begins_with_a_line_that_says_what_it_is(name: str) -> None:
    from chaccu.train.recipe import describe_recipe

    line = describe_recipe(name)
    assert len(line) > 30
    assert not line.startswith("#")
    assert read_fields(Path(name))
