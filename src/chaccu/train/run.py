"""A whole run: a recipe checked against its model and data, trained, and its result written to an artifact folder.

Invariants: losses before and after are measured on the same held-out rows; what ends the run early (Ctrl-C, an error, a full
disk) leaves no folder under the recipe's `output`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_folder,
    copy_files,
    library_versions,
    manifest_sha256,
    read_manifest,
    require_free_space,
    sha256_file,
    write_json,
    write_manifest,
)
from chaccu.conversation import TOKENIZER_FILES, TextTokenizer, check_format, resolve_format
from chaccu.errors import ArtifactError, RecipeError
from chaccu.train.base_model import find_base
from chaccu.train.loop import evaluate, run_steps
from chaccu.train.model import TrainableModel
from chaccu.train.pack import encode_sources, pack_rows
from chaccu.train.positions import check_lengths, load_config
from chaccu.train.preflight import check_stop_trained, check_vocabulary
from chaccu.train.processes import Processes, check_processes, joined
from chaccu.train.recipe import Recipe
from chaccu.train.report import StepReport
from chaccu.train.token_rows import plan_token_rows


class TrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run. Losses are nats a trained token on the validation rows (None without validation data); `token_rows`:
    tokens whose rows were trained beside LoRA; `skipped_steps`: steps that changed nothing, since they were not finite;
    `config_changes`: values of the base's config that merging has to change too."""

    output: str
    steps: int
    loss_before: float | None
    loss_after: float | None
    tokens: int
    trained_tokens: int
    seconds: float
    fill: float
    token_rows: list[str]
    skipped_steps: int
    log: list[StepReport]
    config_changes: dict[str, Any] = {}
    reused: bool = False


def train(
    recipe: Recipe,
    *,
    report: Callable[[StepReport], None] | None = None,
    fresh: bool = False,
    replace: bool = False,
) -> TrainReport:
    """Run a recipe and write its output folder; an output made by the same recipe from the same data is reused.

    Under a launcher every process calls it, and process 0 alone reports and writes; the others wait for it. `fresh` trains in
    any case; `replace` trains only when the output is of another recipe or other data, and replaces it.

    Raises `RecipeError`, `TrainError` or `StorageError` before the first step for whatever can be known by then.
    """
    check_processes(recipe)
    with joined(recipe) as processes:
        return _train(recipe, processes, report=report if processes.first else None, fresh=fresh, replace=replace)


def _train(
    recipe: Recipe, processes: Processes, *, report: Callable[[StepReport], None] | None, fresh: bool, replace: bool
) -> TrainReport:
    output = Path(recipe.output)
    base = find_base(recipe.model)
    chat_format = resolve_format(_format_name(recipe, base), base)
    inputs = {source.path: sha256_file(Path(source.path)) for source in (*recipe.data, *recipe.validation)}
    finished = None if fresh else processes.decide(lambda: _finished_run(output, recipe, inputs, replace=replace))
    if finished is not None:
        return finished
    check_lengths(load_config(base, recipe)[0], recipe)
    tokenizer = TextTokenizer.load(base)
    check_format(chat_format, tokenizer)
    encoded = encode_sources(recipe.data, chat_format, tokenizer, sequence_len=recipe.sequence_len, seed=recipe.seed)
    held_out = encode_sources(recipe.validation, chat_format, tokenizer, sequence_len=recipe.sequence_len, seed=recipe.seed)
    check_stop_trained(encoded, chat_format, tokenizer)
    rows = pack_rows(encoded, recipe.row_len, seed=recipe.seed)
    validation = pack_rows(held_out, recipe.row_len, seed=recipe.seed)
    rows_to_train = plan_token_rows(recipe.lora, encoded, tokenizer) if recipe.method == "lora" else None
    # Under its folder's name, so that the hub is asked once.
    local_recipe = msgspec.structs.replace(recipe, model=str(base))
    model = TrainableModel(local_recipe, processes.device, rows_to_train, processes=processes)
    check_vocabulary([*encoded, *held_out], tokenizer, model.vocab_size)
    require_free_space(output.parent, 4 * sum(parameter.numel() for parameter in model.parameters) + 64_000_000, "the result")
    begun = time.monotonic()
    before = evaluate(model, validation)
    log = run_steps(model, rows, recipe, report, decode=tokenizer.decode)
    after = evaluate(model, validation)
    tokens = sum(len(row.ids_T) for row in rows)
    result = TrainReport(
        output=str(output),
        steps=len(log),
        loss_before=before,
        loss_after=after,
        tokens=tokens,
        trained_tokens=sum(row.trained_tokens for row in rows),
        seconds=time.monotonic() - begun,
        fill=tokens / (len(rows) * recipe.row_len),
        token_rows=[tokenizer.token_text(token) for token in model.token_rows],
        skipped_steps=sum(step.skipped for step in log),
        log=log,
        config_changes=model.config_changes,
    )
    _save(model, recipe, base, chat_format.name, tokenizer, inputs, result)
    return result


def _format_name(recipe: Recipe, base: Path) -> str:
    if recipe.format is not None:
        return recipe.format
    named = read_manifest(base).chat_format if (base / MANIFEST_NAME).is_file() else None
    if named is None:
        raise RecipeError(
            f"no chat format is named for {recipe.model}.", remedy="set format: to a name out of chaccu format list"
        )
    return named


def _finished_run(output: Path, recipe: Recipe, inputs: dict[str, str], *, replace: bool) -> TrainReport | None:
    if not output.exists():
        return None
    manifest = read_manifest(output, kind=("adapter", "model"))
    if manifest.settings == msgspec.to_builtins(recipe) and manifest.inputs == inputs:
        return msgspec.convert({**manifest.facts, "reused": True}, TrainReport)
    if replace:
        return None
    raise ArtifactError(
        f"{output} holds the result of another recipe or other data.",
        remedy="choose another output, or give --replace",
    )


def _save(
    model: TrainableModel,
    recipe: Recipe,
    base: Path,
    chat_format: str,
    tokenizer: TextTokenizer,
    inputs: dict[str, str],
    result: TrainReport,
) -> None:
    weights = model.gather_weights(trained_only=recipe.method == "lora")
    if not model.processes.first:
        return
    with atomic_folder(Path(recipe.output)) as folder:
        model.full.save_pretrained(str(folder), **({} if weights is None else {"state_dict": weights}))
        copy_files(base, folder, TOKENIZER_FILES)
        write_json(folder / "train_log.json", result.log)
        write_manifest(
            folder,
            Manifest(
                kind="adapter" if recipe.method == "lora" else "model",
                name=Path(recipe.output).name,
                chat_format=chat_format,
                tokenizer_sha256=tokenizer.sha256,
                parents={"base": manifest_sha256(base)} if (base / MANIFEST_NAME).is_file() else {},
                inputs=inputs,
                settings=msgspec.to_builtins(recipe),
                facts=msgspec.to_builtins(result),
                versions=library_versions("torch", "transformers", "peft", "tokenizers"),
            ),
        )
