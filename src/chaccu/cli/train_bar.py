"""The live bar of `chaccu train`, on stderr: what each step was, and how long the rest takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chaccu.train.recipe import Recipe
    from chaccu.train.report import EvalReport, StepReport, TrainReport


def train_with_bar(recipe: Recipe, *, fresh: bool, replace: bool, shown: bool = True) -> TrainReport:
    """Run the recipe (see `chaccu.train.run.train`) behind the bar, or without one where it is not `shown`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from chaccu.train.run import train

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("loading the model", total=None, left="")

        def show(step: StepReport) -> None:
            left = f"{format_seconds(step.left_s)} left"
            bar.update(task, description=describe_step(step), total=step.steps, completed=step.step, left=left)

        def show_eval(report: EvalReport) -> None:
            for line in describe_eval(report):
                bar.console.print(line, markup=False, highlight=False, no_wrap=True, overflow="ellipsis")

        def show_encoding(done: int, total: int) -> None:
            if done < total:
                bar.update(task, description=f"encoding {total:,} conversations", total=total, completed=done)
            else:
                bar.reset(task, description="loading the model", total=None)

        return train(recipe, report=show, report_eval=show_eval, report_encoding=show_encoding, fresh=fresh, replace=replace)


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
