"""What lies at a recipe's output: reused, named in what it differs, or left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.artifact import Manifest, manifest_sha256, read_manifest, sha256_file, write_manifest
from chaccu.errors import ArtifactError, RecipeError
from chaccu.train.outputs import check_output, find_finished
from chaccu.train.recipe import Recipe

# What a result of the first version that trained says of itself: a recipe with fewer keys, its steps in the manifest.
OLD_FACTS: dict[str, Any] = {
    "output": "out",
    "steps": 1,
    "loss_before": 2.0,
    "loss_after": 1.0,
    "tokens": 10,
    "trained_tokens": 5,
    "seconds": 1.0,
    "fill": 0.9,
    "token_rows": [],
    "log": [{"step": 1, "steps": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_s": 9.0, "left_s": 0.0}],
    "reused": False,
}
NEWER_KEYS = ("rope_scaling", "processes", "global_batch_size", "max_skipped_steps", "eval_steps", "save_steps", "report_to")


def leave_result(recipe: Recipe, *, without: tuple[str, ...] = (), **facts: Any) -> dict[str, str]:
    """A result of `recipe` at its output, whose recipe has not the keys `without`; hashes of the data."""
    inputs = {source.path: sha256_file(Path(source.path)) for source in (*recipe.data, *recipe.validation)}
    settings = {key: value for key, value in msgspec.to_builtins(recipe).items() if key not in without}
    Path(recipe.output).mkdir()
    parents = {"base": manifest_sha256(Path(recipe.model))}
    facts = {**OLD_FACTS, **facts}
    manifest = Manifest(kind="adapter", name="out", settings=settings, inputs=inputs, parents=parents, facts=facts)
    write_manifest(Path(recipe.output), manifest)
    return inputs


def test_a_result_of_an_older_recipe_with_fewer_keys_is_reused_when_their_defaults_are_asked_for(recipe: Recipe) -> None:
    inputs = leave_result(recipe, without=NEWER_KEYS)
    found = find_finished(recipe, inputs, replace=False)
    assert found is not None
    assert found.reused
    assert (found.loss_after, found.skipped_steps, found.log) == (1.0, 0, [])


def test_of_a_result_of_another_run_it_is_said_in_what_it_differs(recipe: Recipe) -> None:
    inputs = leave_result(recipe, without=NEWER_KEYS)
    other = msgspec.structs.replace(recipe, learning_rate=0.5, processes=2)
    inputs[recipe.data[0].path] = "0" * 64
    with pytest.raises(ArtifactError) as caught:
        find_finished(other, inputs, replace=False)
    assert "processes is 2 here and 1 there; learning_rate is 0.5 here and 0.01 there" in caught.value.message
    assert f"{recipe.data[0].path} has changed" in caught.value.message
    assert find_finished(other, inputs, replace=True) is None


def test_a_result_of_a_newer_recipe_is_named_as_one(recipe: Recipe) -> None:
    inputs = leave_result(recipe)
    manifest = read_manifest(Path(recipe.output))
    write_manifest(Path(recipe.output), msgspec.structs.replace(manifest, settings={**manifest.settings, "moons": 2}))
    with pytest.raises(ArtifactError, match=r"not one of this version.*moons"):
        find_finished(recipe, inputs, replace=False)


def test_a_result_of_a_base_that_has_changed_is_not_reused(recipe: Recipe, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    write_manifest(base, Manifest(kind="model", name="base"))
    recipe = msgspec.structs.replace(recipe, model=str(base))
    weights = {"model.safetensors": sha256_file(base / "model.safetensors")}
    inputs = leave_result(recipe, base_weights=weights)
    write_manifest(base, Manifest(kind="model", name="base", versions={"torch": "99"}))
    assert find_finished(recipe, inputs, replace=False) is not None
    (base / "model.safetensors").write_bytes(b"others")
    write_manifest(base, Manifest(kind="model", name="base"))
    with pytest.raises(ArtifactError, match=r"the model in .* has changed"):
        find_finished(recipe, inputs, replace=False)


def test_a_folder_that_is_no_result_of_training_is_left_alone_even_with_fresh(recipe: Recipe) -> None:
    from chaccu.train.run import train

    pytest.importorskip("torch", reason="torch is not installed")
    precious = Path(recipe.output) / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    for options in ({"fresh": True}, {"replace": True}, {}):
        with pytest.raises(ArtifactError, match="no result of training, so it is left as it is"):
            train(recipe, **options)
    assert precious.read_text() == "years of work"


def test_the_model_s_own_folder_is_no_output(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="folder of the model itself"):
        check_output(msgspec.structs.replace(recipe, output=recipe.model))
