"""A whole run: a recipe checked against its model and data, trained, and its result written to an artifact folder.

Invariants: losses before and after are measured on the same held-out rows; what ends the run early (Ctrl-C, an error, a full
disk) leaves no folder under the recipe's `output`, only its log under `<output>.run` and what snapshots there were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
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
    weights_sha256,
    write_manifest,
)
from chaccu.conversation import TOKENIZER_FILES, ChatFormat, TextTokenizer, check_format, resolve_format
from chaccu.errors import RecipeError
from chaccu.train.base_model import find_base
from chaccu.train.encode import encode_sources
from chaccu.train.evaluations import Evaluations
from chaccu.train.loop import run_steps
from chaccu.train.model import TrainableModel, choose_precision
from chaccu.train.out_of_memory import explain_out_of_memory
from chaccu.train.outputs import check_output, find_finished
from chaccu.train.pack import PackedRow, TokenSequence, pack_rows
from chaccu.train.positions import check_lengths, load_config
from chaccu.train.preflight import check_stop_trained, check_vocabulary
from chaccu.train.processes import Processes, check_processes, joined
from chaccu.train.recipe import Recipe
from chaccu.train.report import EvalReport, StepReport, TrainReport
from chaccu.train.samples import Sampler, choose_prompts
from chaccu.train.snapshots import Snapshots
from chaccu.train.token_rows import plan_token_rows
from chaccu.train.trackers import Reporter, RunFolder, import_tracker, open_reporter

_LIBRARIES = ("torch", "transformers", "peft", "tokenizers")


def train(
    recipe: Recipe,
    *,
    report: Callable[[StepReport], None] | None = None,
    report_eval: Callable[[EvalReport], None] | None = None,
    report_encoding: Callable[[int, int], None] | None = None,
    fresh: bool = False,
    replace: bool = False,
) -> TrainReport:
    """Run a recipe and write its output folder; an output made by the same recipe from the same data is reused.

    Under a launcher every process calls it, and process 0 alone reports and writes; the others wait for it. `report_encoding`
    is told how many conversations are encoded, and of how many. `fresh` trains in any case; `replace` trains only when the
    output is of another recipe or other data, and replaces it.

    Raises `RecipeError`, `TrainError` or `StorageError` before the first step for whatever can be known by then.
    """
    check_processes(recipe)
    with joined(recipe) as processes:
        return _train(
            recipe,
            processes,
            report=report,
            report_eval=report_eval,
            report_encoding=report_encoding,
            fresh=fresh,
            replace=replace,
        )


def _train(
    recipe: Recipe,
    processes: Processes,
    *,
    report: Callable[[StepReport], None] | None,
    report_eval: Callable[[EvalReport], None] | None,
    report_encoding: Callable[[int, int], None] | None,
    fresh: bool,
    replace: bool,
) -> TrainReport:
    output = Path(recipe.output)
    check_output(recipe)
    paths = [source.path for source in (*recipe.data, *recipe.validation)]
    inputs = processes.decide(lambda: {path: sha256_file(Path(path)) for path in paths})
    finished = None if fresh else processes.decide(lambda: find_finished(recipe, inputs, replace=replace))
    if finished is not None:
        return finished
    import_tracker(recipe.report_to)
    base = find_base(recipe.model)
    chat_format = resolve_format(_format_name(recipe, base), base)
    config, _ = load_config(base, recipe)
    check_lengths(config, recipe)
    tokenizer = TextTokenizer.load(base)
    check_format(chat_format, tokenizer)
    encoded, held_out = _encode(recipe, chat_format, tokenizer, processes, report_encoding)
    check_stop_trained(encoded, chat_format, tokenizer)
    rows = pack_rows(encoded, recipe.row_len, seed=recipe.seed)
    validation = pack_rows(held_out, recipe.row_len, seed=recipe.seed)
    rows_to_train = plan_token_rows(recipe.lora, encoded, tokenizer) if recipe.trains_adapter else None
    # Under its folder's name, so that the hub is asked once.
    local_recipe = msgspec.structs.replace(recipe, model=str(base))
    told = recipe, config, processes.device, choose_precision(recipe, processes.device)
    with explain_out_of_memory("loading the model", *told):
        model = TrainableModel(local_recipe, processes.device, rows_to_train, processes=processes)
    check_vocabulary([*encoded, *held_out], tokenizer, model.vocab_size)
    _require_space(output, recipe, model)
    save = partial(_save, model, recipe, base, chat_format.name, tokenizer, inputs)
    facts: dict[str, Any] = {
        "token_rows": [tokenizer.token_text(token) for token in model.token_rows],
        "packing": model.packing,
        "config_changes": model.config_changes,
    }
    evaluations = None
    if validation:
        prompts = choose_prompts(recipe, chat_format, tokenizer)
        sampler = Sampler(model, prompts, chat_format, tokenizer, max_tokens=recipe.sample_tokens)
        evaluations = Evaluations(model, validation, sampler)
    snapshots = Snapshots(
        output,
        limit=recipe.save_total_limit if processes.first else None,
        save=lambda path, state: save(path, {**state, **facts}),
    )
    run_folder = RunFolder(output)
    begun = time.monotonic()
    opened = (
        open_reporter(recipe, run_folder, on_step=report, on_eval=report_eval) if processes.first else nullcontext(Reporter())
    )
    with opened as reporter, explain_out_of_memory("training", *told):
        log = _run_and_report(model, rows, recipe, reporter, evaluations, snapshots, tokenizer)
    result = _summarise(recipe, rows, log, evaluations, seconds=time.monotonic() - begun, facts=facts)
    # The steps stand in the log: thousands of them would bury what a manifest is read for.
    save(output, {name: value for name, value in msgspec.to_builtins(result).items() if name != "log"}, logs=run_folder)
    if processes.first:
        run_folder.remove()
    return result


def _encode(
    recipe: Recipe,
    chat_format: ChatFormat,
    tokenizer: TextTokenizer,
    processes: Processes,
    report: Callable[[int, int], None] | None,
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Conversations to train on, of which `report` is told, and those held out."""
    encode = partial(
        encode_sources,
        chat_format=chat_format,
        tokenizer=tokenizer,
        sequence_len=recipe.sequence_len,
        seed=recipe.seed,
        relay=processes.relay,
    )
    return encode(recipe.data, report=report), encode(recipe.validation)


def _run_and_report(
    model: TrainableModel,
    rows: Sequence[PackedRow],
    recipe: Recipe,
    reporter: Reporter,
    evaluations: Evaluations | None,
    snapshots: Snapshots,
    tokenizer: TextTokenizer,
) -> list[StepReport]:
    """The steps, with evaluations before, after and as often as the recipe says, and snapshots."""

    def evaluate_after(step: int) -> None:
        if evaluations is None:
            return
        before, report = evaluations.last, evaluations.run(step)
        if report is not before:
            reporter.record(report)

    def finish_step(step: StepReport) -> None:
        reporter.record(step)
        if recipe.eval_steps is not None and step.step % recipe.eval_steps == 0:
            evaluate_after(step.step)
        if recipe.save_steps is not None and step.step % recipe.save_steps == 0:
            held_out = None if evaluations is None else evaluations.loss_at(step.step)
            snapshots.write(step.step, {"step": step.step, "steps": step.steps, "held_out_loss": held_out})

    evaluate_after(0)
    log = run_steps(model, rows, recipe, finish_step, decode=tokenizer.decode)
    evaluate_after(len(log))
    return log


def _summarise(
    recipe: Recipe,
    rows: Sequence[PackedRow],
    log: list[StepReport],
    evaluations: Evaluations | None,
    *,
    seconds: float,
    facts: dict[str, Any],
) -> TrainReport:
    first, last = (None, None) if evaluations is None else (evaluations.first, evaluations.last)
    tokens = sum(len(row.ids_T) for row in rows)
    return TrainReport(
        output=recipe.output,
        steps=len(log),
        loss_before=None if first is None else first.loss,
        loss_after=None if last is None else last.loss,
        best_loss=None if last is None else last.best_loss,
        best_step=None if last is None else last.best_step,
        samples=last.samples if last else (),
        tokens=tokens,
        trained_tokens=sum(row.trained_tokens for row in rows),
        seconds=seconds,
        fill=tokens / (len(rows) * recipe.row_len),
        skipped_steps=sum(step.skipped for step in log),
        log=log,
        **facts,
    )


def _require_space(output: Path, recipe: Recipe, model: TrainableModel) -> None:
    """For the result, and for the snapshots, of which there is one more while the oldest is not yet removed."""
    count = 1 if recipe.save_steps is None else recipe.save_total_limit + 2
    size = 4 * sum(parameter.numel() for parameter in model.parameters) + 64_000_000
    require_free_space(output.parent, count * size, "the result" if count == 1 else "the result with its snapshots")


def _format_name(recipe: Recipe, base: Path) -> str:
    if recipe.format is not None:
        return recipe.format
    named = read_manifest(base).chat_format if (base / MANIFEST_NAME).is_file() else None
    if named is None:
        raise RecipeError(
            f"no chat format is named for {recipe.model}.", remedy="set format: to a name out of chaccu format list"
        )
    return named


def _base_weights(base: Path) -> dict[str, Any]:
    """What tells the base's weights on another machine, where its manifest may have another hash."""
    return {"base_weights": weights_sha256(read_manifest(base))} if (base / MANIFEST_NAME).is_file() else {}


def _save(
    model: TrainableModel,
    recipe: Recipe,
    base: Path,
    chat_format: str,
    tokenizer: TextTokenizer,
    inputs: dict[str, str],
    path: Path,
    facts: dict[str, Any],
    *,
    logs: RunFolder | None = None,
) -> None:
    output = Path(recipe.output)
    weights = model.gather_weights(trained_only=recipe.trains_adapter)
    if not model.processes.first:
        return
    with atomic_folder(path) as folder:
        model.full.save_pretrained(str(folder), **({} if weights is None else {"state_dict": weights}))
        copy_files(base, folder, TOKENIZER_FILES)
        if logs is not None:
            logs.copy_to(folder / "logs")
        write_manifest(
            folder,
            Manifest(
                kind="adapter" if recipe.trains_adapter else "model",
                name=output.name if path == output else f"{output.name}-{path.name}",
                chat_format=chat_format,
                tokenizer_sha256=tokenizer.sha256,
                parents={"base": manifest_sha256(base)} if (base / MANIFEST_NAME).is_file() else {},
                inputs=inputs,
                settings=msgspec.to_builtins(recipe),
                facts={**facts, **_base_weights(base)},
                versions=library_versions(*_LIBRARIES, *(["bitsandbytes"] if model.packing else [])),
            ),
        )
