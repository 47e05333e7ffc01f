"""Recipes: nothing is ignored, and what is wrong is named with its value and the nearest right one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from chaccu.errors import RecipeError
from chaccu.train.recipe import DataSource, LoraOptions, Recipe, list_recipes, load_recipe, parse_recipe

FIELDS: dict[str, Any] = {"model": "base", "output": "out", "data": [{"path": "train.jsonl"}]}
TEXT = "model: base\noutput: out\ndata:\n  - path: train.jsonl\n"


def write_recipe(folder: Path, text: str = TEXT) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_only_three_keys_are_needed() -> None:
    assert parse_recipe(dict(FIELDS)) == Recipe(model="base", output="out", data=[DataSource(path="train.jsonl")])


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'learning_rat'.*\n.*'learning_rate'"):
        parse_recipe({**FIELDS, "learning_rat": 1e-4})


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"method": "lroa"}, ["method", "'lroa'", "'lora'"]),
        ({"lr_scheduler": "cosin"}, ["lr_scheduler", "'cosin'", "'cosine'"]),
        ({"lora": {"rnak": 4}}, ["lora", "rnak", "'rank'"]),
        ({"data": [{"pth": "x"}]}, ["data", "pth", "'path'"]),
        ({"sequence_len": "many"}, ["sequence_len", "'many'"]),
        ({"lora": {"rank": "many"}}, ["lora.rank", "'many'"]),
    ],
)
def test_a_wrong_value_or_inner_key_is_named(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**FIELDS, **fields})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "key", "value"),
    [
        ({"sequence_len": 0}, "sequence_len", "0"),
        ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps", "-2"),
        ({"processes": 0}, "processes", "0"),
        ({"global_batch_size": 0}, "global_batch_size", "0"),
        ({"learning_rate": -1e-4}, "learning_rate", "-0.0001"),
        ({"learning_rate": float("nan")}, "learning_rate", "nan"),
        ({"max_grad_norm": 0}, "max_grad_norm", "0"),
        ({"num_train_epochs": 0}, "num_train_epochs", "0"),
        ({"max_steps": -1}, "max_steps", "-1"),
        ({"max_steps": 0}, "max_steps", "0"),
        ({"max_minutes": 0}, "max_minutes", "0"),
        ({"weight_decay": -0.1}, "weight_decay", "-0.1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio", "1.0"),
        ({"lora": {"rank": 0}}, "lora.rank", "0"),
        ({"data": [{"path": "x", "repeat": 0}]}, "repeat", "0"),
        ({"data": [{"path": "x", "conversations": 0}]}, "conversations", "0"),
        ({"validation": [{"path": "x", "max_tokens": -5}]}, "max_tokens", "-5"),
    ],
)
def test_a_value_out_of_range_is_named(fields: dict[str, Any], key: str, value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**FIELDS, **fields})
    assert key in caught.value.message
    assert value in caught.value.message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sequence_len": 2048, "micro_batch_tokens": 1024}, "micro_batch_tokens is 1024 and sequence_len 2048"),
        ({"optimizer": "adamw_8bit", "method": "lora"}, "adamw_8bit is for method: full"),
        ({"optimizer": "adamw_bf16_sr", "method": "lora"}, "adamw_bf16_sr is for method: full"),
        ({"optimizer": "adamw_bf16_sr", "method": "full", "precision": "fp32"}, "keeps weights in bf16, and precision is fp32"),
        ({"optimizer_in_backward": True, "method": "full"}, "does not go with optimizer adamw"),
        ({"precision": "fp8"}, "fp8 is for method: full"),
        ({"precision": "fp8", "method": "full"}, "goes with compile: true"),
        ({"precision": "fp8", "method": "full", "compile": True, "sequence_len": 100}, "multiple of 16 tokens"),
    ],
)
def test_values_that_are_wrong_together_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        parse_recipe({**FIELDS, **fields})
    assert caught.value.remedy


def test_missing_keys_and_no_data_are_refused() -> None:
    with pytest.raises(RecipeError, match="output"):
        parse_recipe({"model": "base", "data": [{"path": "x"}]})
    with pytest.raises(RecipeError, match="no data"):
        parse_recipe({**FIELDS, "data": []})


def test_overrides_replace_values_and_reach_inside(tmp_path: Path) -> None:
    overrides = ["learning_rate=1e-4", "lora.rank=16", "method=full", "max_steps=7", "output=runs/a=b", "format=null"]
    recipe = load_recipe(write_recipe(tmp_path, TEXT + "format: chatml\nmax_steps: 3\n"), overrides)
    assert recipe.learning_rate == 1e-4
    assert recipe.lora == LoraOptions(rank=16)
    assert (recipe.method, recipe.max_steps, recipe.output, recipe.format) == ("full", 7, "runs/a=b", None)


def test_a_rate_written_1e_4_is_a_number_in_the_file_too(tmp_path: Path) -> None:
    assert load_recipe(write_recipe(tmp_path, TEXT + "learning_rate: 1e-4\n")).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("learning_rate", "'learning_rate' is no override"),
        ("lora.rnak=4", "rnak"),
        ("lerning_rate=1", "lerning_rate"),
        ("model.name=x", "model.name"),
        ("data=[", r"data=\["),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        load_recipe(write_recipe(tmp_path), [override])


def test_the_documented_recipe_is_one() -> None:
    page = (Path(__file__).parents[3] / "docs" / "train.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    recipe = parse_recipe(yaml.safe_load(block))
    documented, known = set(yaml.safe_load(block)), {field.name for field in msgspec.structs.fields(Recipe)}
    assert documented == known
    assert recipe.lora == LoraOptions()


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_one(name: str) -> None:
    recipe = load_recipe(Path(name))
    assert recipe.data
    assert recipe.validation


def test_every_shipped_recipe_stands_in_the_page_s_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "train.md").read_text(encoding="utf-8")
    section = page.partition("## Recipes that ship")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)) == list_recipes()


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe '.*absent.yaml'"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="did you mean 'quickstart-cpu'"):
        load_recipe(Path("quickstart_cpu"))
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(write_recipe(tmp_path, "model: [\n"))
    with pytest.raises(RecipeError, match="holds no keys"):
        load_recipe(write_recipe(tmp_path, "just words\n"))
