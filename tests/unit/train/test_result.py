"""What a run leaves: weights in the precision of the run, and a base that others can find."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.testing.tiny import build_llama
from chaccu.train.recipe import Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train import run  # noqa: E402 (torch may be absent)


def change(recipe: Recipe, **fields: Any) -> Recipe:
    fields = {"method": "full", "max_steps": 2, "sample_answers": 0, "learning_rate": 1e-3, **fields}
    return msgspec.structs.replace(recipe, **fields)


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_trained_in_float32_are_saved_in_the_precision_of_the_run(
    recipe: Recipe, tmp_path: Path, precision: str, dtype: Any, tied: bool
) -> None:
    base = build_llama(tmp_path / "base", tie_word_embeddings=tied)
    recipe = change(recipe, model=str(base), precision=precision, save_steps=2)
    report = run.train(recipe)
    for folder in (Path(recipe.output), tmp_path / "out.snapshots" / "step-000002"):
        model = load(folder)
        assert {one.dtype for one in model.parameters()} == {dtype}
        assert json.loads((folder / "config.json").read_bytes())["dtype"] == str(dtype).removeprefix("torch.")
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    # It is what was measured: a run from it begins where this one has ended.
    again = run.train(change(recipe, model=recipe.output, output=str(tmp_path / "again"), format="chatml", max_steps=1))
    assert again.loss_before == pytest.approx(report.loss_after, rel=2e-3 if precision == "bf16" else 1e-6)


def test_an_adapter_names_its_base_as_the_recipe_does(recipe: Recipe, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_base", lambda name: llama)
    recipe = change(recipe, method="lora", model="someone/tiny-llama")
    with warnings.catch_warnings():
        # As peft warns when it cannot ask the hub about that name.
        warnings.simplefilter("error", UserWarning)
        run.train(recipe)
    assert str(llama) not in "".join(file.read_text() for file in Path(recipe.output).glob("*.[jm]*"))
    config = json.loads((Path(recipe.output) / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "someone/tiny-llama"
