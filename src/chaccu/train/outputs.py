"""What lies at a recipe's output already: an earlier result to be reused, one to be replaced, or what is not ours to touch.

Invariant: a folder that is no result of training is never replaced, whatever the command is told; of a result of another run
the message says in what the two differ. A result of an older Chaccu, whose recipe had fewer keys, is one with their defaults.
This module is free of torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import MANIFEST_NAME, Manifest, manifest_sha256, read_manifest, weights_sha256
from chaccu.errors import ArtifactError, RecipeError
from chaccu.train.recipe import Recipe
from chaccu.train.report import LOG_NAME, StepReport, TrainReport, read_log

_KINDS = ("adapter", "model")


def check_output(recipe: Recipe) -> None:
    """Raise `RecipeError` when the output is the model's own folder, `ArtifactError` when it is no result of training."""
    output, base = Path(recipe.output), Path(recipe.model).expanduser()
    if not output.exists():
        return
    if base.exists() and output.samefile(base):
        raise RecipeError(f"output is {output}, the folder of the model itself.", remedy="choose another output")
    try:
        read_manifest(output, kind=_KINDS)
    except ArtifactError as error:
        raise ArtifactError(
            f"output {output} is there already and is no result of training, so it is left as it is: {error.message}",
            remedy="choose another output, or move it away",
        ) from error


def find_finished(recipe: Recipe, inputs: dict[str, str], *, replace: bool) -> TrainReport | None:
    """The report of the result that lies at the output, when this recipe made it from this base and data; None when there is
    nothing, or (`replace`) something else. `inputs`: SHA-256 of the data by path. Raises `ArtifactError`."""
    output = Path(recipe.output)
    if not output.exists():
        return None
    manifest = read_manifest(output, kind=_KINDS)
    differences = _compare(manifest, recipe, inputs)
    if not differences:
        return _read_report(output, manifest)
    if replace:
        return None
    raise ArtifactError(
        f"{output} holds the result of another run: {'; '.join(differences)}.",
        remedy="choose another output, or give --replace",
    )


def _compare(manifest: Manifest, recipe: Recipe, inputs: dict[str, str]) -> list[str]:
    """In what the run of `manifest` differs from one of this recipe now."""
    try:
        made = msgspec.to_builtins(msgspec.convert(manifest.settings, Recipe))
    except msgspec.ValidationError as error:
        return [f"its recipe is not one of this version ({error})"]
    wanted = msgspec.to_builtins(recipe)
    found = [f"{key} is {_show(wanted[key])} here and {_show(made[key])} there" for key in wanted if wanted[key] != made[key]]
    found += [f"{path} has changed" for path in inputs if manifest.inputs.get(path, inputs[path]) != inputs[path]]
    return [*found, *_compare_bases(manifest, Path(recipe.model).expanduser())]


def _compare_bases(manifest: Manifest, base: Path) -> list[str]:
    """Whether another base lies where the run's base lay: by its weights, where they are known, since its manifest also names
    versions."""
    if "base" not in manifest.parents or not (base / MANIFEST_NAME).is_file():
        return []
    if manifest_sha256(base) == manifest.parents["base"]:
        return []
    known = manifest.facts.get("base_weights")
    return [] if known and known == weights_sha256(read_manifest(base)) else [f"the model in {base} has changed"]


def _read_report(output: Path, manifest: Manifest) -> TrainReport:
    path = output / "logs" / LOG_NAME
    # Results of older versions have no log.
    log = [record for record in read_log(path) if isinstance(record, StepReport)] if path.is_file() else []
    return msgspec.convert({**manifest.facts, "log": msgspec.to_builtins(log), "reused": True}, TrainReport)


def _show(value: Any) -> str:
    return "not given" if value is None else msgspec.json.encode(value).decode()
