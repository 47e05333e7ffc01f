"""The live bar of `chaccu train`, on stderr: what each step was, and how long the rest takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chaccu.train.recipe import Recipe
    from chaccu.train.report import EvalReport, Record, StartReport, StepReport, TrainReport


def train_with_bar(recipe: Recipe, *, fresh: bool, replace: bool, shown: bool = True) -> TrainReport:
    """Run the recipe (see `chaccu.train.run.train`) behind the bar, or without one where it is not `shown`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from chaccu.train.report import EvalReport, StepReport
    from chaccu.train.run import train

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("reading the data", total=None, count="", left="")

        def advance(what: str, done: int, total: int, left: str = "") -> None:
            bar.update(task, description=what, total=total, completed=done, count=f"{done}/{total}", left=left)

        def show(record: Record) -> None:
            if isinstance(record, StepReport):
                advance(describe_step(record), record.step, record.steps, f"{format_seconds(record.left_s)} left")
                return
            lines = describe_eval(record) if isinstance(record, EvalReport) else describe_start(record)
            for line in lines:
                bar.console.print(line, markup=False, highlight=False, no_wrap=True, overflow="ellipsis")

        def show_encoding(done: int, total: int) -> None:
            if done < total:
                advance(f"encoding {total:,} conversations", done, total)
            else:
                bar.reset(task, description="loading the model", total=None, count="", left="")

        return train(recipe, report=show, report_encoding=show_encoding, fresh=fresh, replace=replace)


def describe_start(start: StartReport) -> list[str]:
    """What a run is about to do, in three lines."""
    left_out = f" ({sum(start.left_out.values()):,} longer ones left out)" if start.left_out else ""
    products = f", {start.float8_products} products a token in fp8" if start.float8_products else ""
    return [
        f"{start.conversations:,} conversations{left_out}, {start.tokens:,} tokens in {start.rows:,} rows",
        f"{start.trained_parameters:,} weights trained in {start.weights_precision}, computed in {start.precision}{products}, "
        f"on {f'{start.processes} processes, ' if start.processes > 1 else ''}{start.device}",
        f"attention: {start.attention}",
    ]


def describe_step(step: StepReport) -> str:
    """A step in one short line; no MFU where none is known."""
    loss, norm = (
        "not finite" if value is None else f"{value:.{digits}f}" for value, digits in ((step.loss, 3), (step.grad_norm, 2))
    )
    parts = [*(["skipped"] if step.skipped else []), f"loss {loss}", f"norm {norm}", f"lr {step.learning_rate:.1e}"]
    parts.append(f"{step.tokens_per_s:,.0f} tok/s")
    if step.mfu is not None:
        parts.append(f"MFU {step.mfu:.1%}")
    parts.append(f"{step.memory_bytes / 1e9:.1f} GB")
    return "  ".join(parts)


def describe_eval(report: EvalReport) -> list[str]:
    """An evaluation in a line, and each sample answer in two."""
    best = "the best so far" if report.best_step == report.step else f"best {report.best_loss:.4f} at {report.best_step}"
    lines = [f"step {report.step}: held-out loss {report.loss:.4f}, {best}"]
    for sample in report.samples:
        answer = sample.answer if sample.ended else f"{sample.answer} …"
        lines += [f"  > {_in_one_line(sample.question)}", f"    {_in_one_line(answer)}"]
    return lines


def _in_one_line(text: str) -> str:
    """`text` without line breaks, and without what a terminal would obey: an untrained model says anything."""
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))


def format_seconds(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
