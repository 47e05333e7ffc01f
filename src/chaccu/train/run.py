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
import torch

from chaccu.artifact import MANIFEST_NAME, read_manifest, sha256_file
from chaccu.conversation import ChatFormat, TextTokenizer, check_format, resolve_format
from chaccu.errors import RecipeError
from chaccu.train.base_model import find_base
from chaccu.train.batch import plan_steps
from chaccu.train.encode import encode_sources
from chaccu.train.evaluations import Evaluations
from chaccu.train.float8 import count_float8
from chaccu.train.loop import run_steps
from chaccu.train.model import TrainableModel, check_device, choose_precision
from chaccu.train.out_of_memory import explain_out_of_memory
from chaccu.train.outputs import check_output, find_finished
from chaccu.train.pack import PackedRow, TokenSequence, pack_rows
from chaccu.train.positions import check_lengths, load_config
from chaccu.train.preflight import check_data, check_stop_trained, check_vocabulary
from chaccu.train.processes import Processes, check_processes, joined
from chaccu.train.recipe import Recipe
from chaccu.train.report import Record, StartReport, StepReport, TrainReport
from chaccu.train.result import ResultWriter
from chaccu.train.samples import Sampler, choose_prompts
from chaccu.train.snapshots import Snapshots
from chaccu.train.token_rows import plan_token_rows
from chaccu.train.trackers import Reporter, RunFolder, import_tracker, open_reporter


def train(
    recipe: Recipe,
    *,
    report: Callable[[Record], None] | None = None,
    report_encoding: Callable[[int, int], None] | None = None,
    fresh: bool = False,
    replace: bool = False,
) -> TrainReport:
    """Run a recipe and write its output folder; an output made by the same recipe from the same data is reused.

    Under a launcher every process calls it, and process 0 alone reports and writes; the others wait for it. `report` is told
    how the run begins, and of each step and evaluation; `report_encoding` how many conversations are encoded, and of how many.
    `fresh` trains in any case; `replace` trains only when the output is of another recipe or other data, and replaces it.

    Raises `RecipeError`, `TrainError` or `StorageError` before the first step for whatever can be known by then.
    """
    check_processes(recipe)
    with joined(recipe) as processes:
        return _train(
            recipe,
            processes,
            report=report,
            report_encoding=report_encoding,
            fresh=fresh,
            replace=replace,
        )


def _train(
    recipe: Recipe,
    processes: Processes,
    *,
    report: Callable[[Record], None] | None,
    report_encoding: Callable[[int, int], None] | None,
    fresh: bool,
    replace: bool,
) -> TrainReport:
    check_output(recipe)
    check_data(recipe)
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
    check_device(recipe, config, processes.device)
    tokenizer = TextTokenizer.load(base)
    check_format(chat_format, tokenizer)
    left_out: dict[str, int] = {}
    encoded, held_out = _encode(recipe, chat_format, tokenizer, processes, report_encoding, left_out)
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
    writer = ResultWriter(model, recipe, base, chat_format, tokenizer, inputs)
    writer.require_space()
    facts: dict[str, Any] = {
        "token_rows": [tokenizer.token_text(token) for token in model.token_rows],
        "packing": model.packing,
        "config_changes": model.config_changes,
        "left_out": left_out,
    }
    evaluations = _prepare_evaluations(model, validation, recipe, chat_format, tokenizer)
    output = Path(recipe.output)
    snapshots = Snapshots(
        output,
        limit=recipe.save_total_limit if processes.first else None,
        save=lambda path, state: writer.write(path, {**state, **facts}),
    )
    run_folder = RunFolder(output)
    begun = time.monotonic()
    opened = open_reporter(recipe, run_folder, report) if processes.first else nullcontext(Reporter())
    with opened as reporter, explain_out_of_memory("training", *told):
        reporter.record(_describe_start(model, rows, left_out))
        log = _run_and_report(model, rows, recipe, reporter, evaluations, snapshots, tokenizer)
    taken = [row for step in plan_steps(rows, recipe, processes.count)[: len(log)] for row in step]
    result = _summarise(recipe, rows, taken, log, evaluations, seconds=time.monotonic() - begun, facts=facts)
    # The steps stand in the log: thousands of them would bury what a manifest is read for.
    writer.write(output, {name: value for name, value in msgspec.to_builtins(result).items() if name != "log"}, run_folder)
    if processes.first:
        run_folder.remove()
    return result


def _encode(
    recipe: Recipe,
    chat_format: ChatFormat,
    tokenizer: TextTokenizer,
    processes: Processes,
    report: Callable[[int, int], None] | None,
    left_out: dict[str, int],
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Conversations to train on, of which `report` is told, and those held out; `left_out` is filled, by path."""
    encode = partial(
        encode_sources,
        chat_format=chat_format,
        tokenizer=tokenizer,
        sequence_len=recipe.sequence_len,
        seed=recipe.seed,
        relay=processes.relay,
        report_left_out=left_out.__setitem__,
    )
    return encode(recipe.data, report=report), encode(recipe.validation)


def _prepare_evaluations(
    model: TrainableModel, rows: Sequence[PackedRow], recipe: Recipe, chat_format: ChatFormat, tokenizer: TextTokenizer
) -> Evaluations | None:
    """Of the held-out `rows`, with sample answers; None where there are none."""
    if not rows:
        return None
    prompts = choose_prompts(recipe, chat_format, tokenizer)
    return Evaluations(model, rows, Sampler(model, prompts, chat_format, tokenizer, max_tokens=recipe.sample_tokens))


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


def _describe_start(model: TrainableModel, rows: Sequence[PackedRow], left_out: dict[str, int]) -> StartReport:
    device = model.device
    return StartReport(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        processes=model.processes.count,
        precision=_short_name(model.dtype),
        weights_precision=_short_name(model.parameters[0].dtype),
        float8_products=count_float8(model.causal),
        attention=model.describe_attention(),
        trained_parameters=sum(parameter.numel() for parameter in model.parameters),
        conversations=sum(len(row.lengths) for row in rows),
        left_out=left_out,
        rows=len(rows),
        tokens=_count_tokens(rows),
    )


def _count_tokens(rows: Sequence[PackedRow]) -> int:
    return sum(len(row.ids_T) for row in rows)


def _short_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _summarise(
    recipe: Recipe,
    rows: Sequence[PackedRow],
    taken: Sequence[PackedRow],
    log: list[StepReport],
    evaluations: Evaluations | None,
    *,
    seconds: float,
    facts: dict[str, Any],
) -> TrainReport:
    first, last = (None, None) if evaluations is None else (evaluations.first, evaluations.last)
    return TrainReport(
        output=recipe.output,
        steps=len(log),
        loss_before=None if first is None else first.loss,
        loss_after=None if last is None else last.loss,
        best_loss=None if last is None else last.best_loss,
        best_step=None if last is None else last.best_step,
        samples=last.samples if last else (),
        tokens=_count_tokens(taken),
        trained_tokens=sum(row.trained_tokens for row in taken),
        seconds=seconds,
        fill=_count_tokens(rows) / (len(rows) * recipe.row_len),
        skipped_steps=sum(step.skipped for step in log),
        log=log,
        **facts,
    )


def _format_name(recipe: Recipe, base: Path) -> str:
    if recipe.format is not None:
        return recipe.format
    named = read_manifest(base).chat_format if (base / MANIFEST_NAME).is_file() else None
    if named is None:
        raise RecipeError(
            f"no chat format is named for {recipe.model}.", remedy="set format: to a name out of chaccu format list"
        )
    return named
