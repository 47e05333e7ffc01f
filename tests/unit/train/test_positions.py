"""Stretched positions: the encoding changes as its formula says, is saved, and lengths beyond it are refused with figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.artifact import read_manifest
from chaccu.conversation import Conversation, Message
from chaccu.errors import RecipeError, TrainError
from chaccu.testing.tiny import build_llama
from chaccu.train.recipe import DataSource, Recipe, RopeScaling, parse_recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train.model import TrainableModel  # noqa: E402 (torch may be absent)
from chaccu.train.positions import check_lengths, load_config, stretch_positions  # noqa: E402
from chaccu.train.run import train  # noqa: E402
from chaccu.weights.merge import merge_adapter  # noqa: E402

CPU = torch.device("cpu")
LINEAR = RopeScaling(rope_type="linear", factor=2.0)


def recipe_for(model: Path, **fields: Any) -> Recipe:
    return Recipe(
        **{
            "model": str(model),
            "data": [DataSource(path="none")],
            "output": "none",
            "method": "full",
            "precision": "fp32",
            "sequence_len": 512,
            **fields,
        }
    )


def llama_config(**fields: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **fields
    )


def logits_at(model: TrainableModel, ids_T: Any, positions_T: Any) -> Any:
    with torch.no_grad():
        return model.full(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False).logits[0]


def test_a_position_doubled_is_the_plain_one_at_a_linear_factor_of_two(llama: Path) -> None:
    plain, stretched = (TrainableModel(recipe_for(llama, rope_scaling=one), CPU) for one in (None, LINEAR))
    ids_T, positions_T = torch.arange(40) * 5 % 300, torch.arange(40)
    expected_TV = logits_at(plain, ids_T, positions_T)
    torch.testing.assert_close(logits_at(stretched, ids_T, 2 * positions_T), expected_TV, atol=1e-5, rtol=1e-5)
    assert (logits_at(stretched, ids_T, positions_T) - expected_TV).abs().max() > 1e-4


@pytest.mark.parametrize(
    "scaling",
    [LINEAR, RopeScaling(rope_type="yarn", factor=4.0, beta_fast=16.0), RopeScaling(rope_type="llama3", factor=8.0)],
)
def test_a_saved_model_is_stretched_when_it_is_loaded_again(scaling: RopeScaling, llama: Path, tmp_path: Path) -> None:
    model = TrainableModel(recipe_for(llama, rope_scaling=scaling), CPU)
    model.full.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["max_position_embeddings"] == scaling.factor * 512
    assert saved["rope_parameters"]["rope_type"] == scaling.rope_type
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain = TrainableModel(recipe_for(llama), CPU)
    ids_T, positions_T = torch.arange(200) * 7 % 300, torch.arange(200)
    expected_TV = logits_at(model, ids_T, positions_T)
    with torch.no_grad():
        logits_TV = again(input_ids=ids_T[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits_TV, expected_TV, atol=1e-5, rtol=1e-5)
    assert (logits_at(plain, ids_T, positions_T) - expected_TV).abs().max() > 1e-4


def test_an_adapter_s_stretch_reaches_the_merged_model(recipe: Recipe, tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    # As an older transformers wrote it.
    config.pop("rope_parameters")
    (base / "config.json").write_text(json.dumps({**config, "rope_scaling": None, "rope_theta": 10000.0}))
    stretched = msgspec.structs.replace(recipe, model=str(base), rope_scaling=LINEAR, max_steps=1)
    train(stretched)
    assert read_manifest(Path(recipe.output)).settings["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    merge_adapter(base, Path(recipe.output), tmp_path / "merged")
    merged = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert merged.max_position_embeddings == 1024
    assert (merged.rope_parameters["rope_type"], merged.rope_parameters["factor"]) == ("linear", 2.0)
    # And where training goes on from there, nothing is stretched again.
    again, changed = load_config(tmp_path / "merged", stretched)
    assert (again.max_position_embeddings, changed) == (1024, {})


def test_only_layers_that_look_far_are_stretched() -> None:
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=rope,
        max_position_embeddings=1000,
    )
    changed = stretch_positions(config, RopeScaling(rope_type="yarn", factor=4.0))
    assert config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"] == rope["sliding_attention"]
    assert changed["max_position_embeddings"] == config.max_position_embeddings == 4000


def test_dynamic_keeps_the_length_that_its_formula_starts_at() -> None:
    config = llama_config(max_position_embeddings=1000)
    stretch_positions(config, RopeScaling(rope_type="dynamic", factor=4.0))
    assert config.max_position_embeddings == 1000
    check_lengths(config, recipe_for(Path("x"), sequence_len=1000))
    with pytest.raises(TrainError, match=r"longest conversation of a row.*1,001"):
        check_lengths(config, recipe_for(Path("x"), sequence_len=1001))


def test_learnt_positions_cannot_be_stretched() -> None:
    config = transformers.GPT2Config(n_positions=64)
    with pytest.raises(TrainError, match="rotary positions, and gpt2 has none"):
        stretch_positions(config, LINEAR)
    with pytest.raises(TrainError, match="sequence_len is 65, and gpt2 has learnt 64 positions") as caught:
        check_lengths(config, recipe_for(Path("x"), sequence_len=65))
    assert "sequence_len=64" in str(caught.value.remedy)
    check_lengths(config, recipe_for(Path("x"), sequence_len=64))


@pytest.mark.parametrize(
    ("scaling", "length", "says", "remedy"),
    [
        (None, 1025, "sequence_len is 1,025, and the base knows 512 positions", "factor: 3.0"),
        (LINEAR, 1025, "knows 1,024 positions with rope_scaling.factor 2", "factor: 3.0"),
        (LINEAR, 1024, None, None),
        (RopeScaling(rope_type="yarn", factor=3.0), 1536, None, None),
        (RopeScaling(rope_type="llama3", factor=3.0), 1537, "knows 1,536 positions", "factor: 4.0"),
        (RopeScaling(rope_type="linear", factor=4.0, original_max_position_embeddings=256), 1024, None, None),
    ],
)
def test_lengths_beyond_the_positions_are_refused(
    scaling: RopeScaling | None, length: int, says: str | None, remedy: str | None, llama: Path
) -> None:
    recipe = recipe_for(llama, sequence_len=length, rope_scaling=scaling)
    config, _ = load_config(llama, recipe)
    if says is None:
        check_lengths(config, recipe)
        return
    with pytest.raises(TrainError, match=says) as caught:
        check_lengths(config, recipe)
    assert remedy in str(caught.value.remedy)


def test_a_base_that_is_stretched_already_is_not_stretched_again() -> None:
    config = llama_config(max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 4.0})
    assert stretch_positions(config, RopeScaling(rope_type="linear", factor=4.0)) == {}
    check_lengths(config, recipe_for(Path("x"), sequence_len=16384))
    with pytest.raises(TrainError, match="stretched already: linear, factor 4"):
        stretch_positions(config, LINEAR)
    with pytest.raises(TrainError, match="knows 16,384 positions, stretched already"):
        check_lengths(config, recipe_for(Path("x"), sequence_len=16385))


def test_a_run_says_so_before_it_reads_its_data(recipe: Recipe) -> None:
    absent = msgspec.structs.replace(recipe, sequence_len=4096, data=[*recipe.data])
    with pytest.raises(TrainError, match="the base knows 512 positions"):
        train(absent)
    assert not Path(recipe.output).exists()


def test_a_run_trains_on_what_only_the_stretch_reaches(recipe: Recipe, tmp_path: Path) -> None:
    long = Conversation(messages=(Message("user", "sky " * 350), Message("assistant", "The sky is blue. " * 40)), id="long")
    path = tmp_path / "long.jsonl"
    path.write_bytes(msgspec.json.encode(long))
    fields = {"data": [DataSource(path=str(path))], "sequence_len": 2048, "max_steps": 1}
    stretched = RopeScaling(rope_type="linear", factor=4.0)
    report = train(msgspec.structs.replace(recipe, rope_scaling=stretched, **fields))
    assert report.steps == 1
    assert report.tokens > 512


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"rope_type": "linaer", "factor": 2}, ["rope_scaling.rope_type", "'linaer'", "'linear'"]),
        ({"type": "linear", "factor": 2}, ["'type' in rope_scaling", "rope_type"]),
        ({"rope_type": "linear", "factor": 0.5}, ["rope_scaling.factor", "0.5"]),
        ({"rope_type": "linear"}, ["factor"]),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 16}, ["beta_fast", "linear", "yarn"]),
        ({"rope_type": "yarn", "factor": 2, "low_freq_factor": 1}, ["low_freq_factor", "llama3"]),
    ],
)
def test_a_wrong_stretch_is_named(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"model": "m", "output": "o", "data": [{"path": "d"}], "rope_scaling": fields})
    for part in parts:
        assert part in str(caught.value)
