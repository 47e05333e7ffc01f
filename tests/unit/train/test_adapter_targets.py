"""The layers that an adapter is for are there, or the run stops."""

from __future__ import annotations

import msgspec
import pytest

from chaccu.errors import RecipeError
from chaccu.train.recipe import LoraOptions, Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from chaccu.train.model import TrainableModel  # noqa: E402 (torch may be absent)


def build(recipe: Recipe, targets: str | list[str]) -> list[str]:
    """The layers of the recipe's model that get an adapter for `targets`, by the last parts of their names."""
    model = TrainableModel(msgspec.structs.replace(recipe, lora=LoraOptions(target_modules=targets)), torch.device("cpu"))
    adapted = {name.split(".lora_")[0] for name, weight in model.full.named_parameters() if weight.requires_grad}
    return sorted({name.rpartition(".")[2] for name in adapted})


@pytest.mark.parametrize("targets", [["q_proj", "v_porj"], ["v_porj"], r".*\.v_porj", []])
def test_a_name_that_no_layer_has_stops_the_run_though_others_are_right(recipe: Recipe, targets: str | list[str]) -> None:
    with pytest.raises(RecipeError, match=r"lora\.target_modules") as caught:
        build(recipe, targets)
    assert "v_proj" in caught.value.remedy


def test_an_expression_that_is_none_is_said_so(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="no regular expression"):
        build(recipe, "(q_proj")


@pytest.mark.parametrize("targets", [["q_proj", "self_attn.v_proj"], r".*\.(q|v)_proj"])
def test_names_their_ends_and_expressions_are_taken(recipe: Recipe, targets: str | list[str]) -> None:
    assert build(recipe, targets) == ["q_proj", "v_proj"]
