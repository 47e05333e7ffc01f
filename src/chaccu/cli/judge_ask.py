"""`chaccu judge compare`, `grade` and `drift`: judges are asked about answers on file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chaccu.cli import judge_options as o

if TYPE_CHECKING:
    from chaccu.judge.drift import Drift


def register(app: typer.Typer) -> None:
    """Add the commands to `chaccu judge`."""
    app.command(
        "compare",
        epilog="Example: chaccu judge compare runs/answers --judge gpt --url http://127.0.0.1:8000 --out runs/verdicts",
    )(o.with_judge_options(compare_command))
    app.command(
        "grade", epilog="Example: chaccu judge grade runs/answers --judge gpt --url http://127.0.0.1:8000 --out runs/grades"
    )(o.with_judge_options(grade_command))
    app.command("drift", epilog="Example: chaccu judge drift runs/verdicts")(drift_command)


def compare_command(
    options: o.JudgeOptions,
    prompt: Annotated[str, typer.Option(help="Judge's prompt: a shipped name (pair, pair-json, vicuna), or a file.")] = "pair",
    baseline: Annotated[str | None, typer.Option(help="Compare each model with this one, not every pair.")] = None,
    one_order: Annotated[bool, typer.Option("--one-order", help="Show each pair once; its place may then decide.")] = False,
) -> None:
    """Have judges say which of two answers is better, each pair in both orders.

    Run it again with the same --out to ask only what has no verdict yet. Exit code 1 when one is missing at the end.
    """
    from chaccu.cli.judging import Inputs, RunOptions, judge_answers
    from chaccu.judge.tasks import plan_comparisons

    inputs = Inputs.load(options, prompt)
    models = inputs.models if baseline is None else inputs.on_file.choose_models([baseline, *inputs.models])
    tasks = plan_comparisons(
        inputs.questions,
        inputs.on_file,
        models,
        inputs.prompts,
        baseline=baseline,
        both_orders=not one_order,
        unit=options.by.value,
    )
    settings = {"command": "compare", "baseline": baseline, "both_orders": not one_order}
    judge_answers(tasks, inputs, RunOptions.build(options), settings)


def grade_command(
    options: o.JudgeOptions,
    prompt: Annotated[
        str, typer.Option(help="Judge's prompt: a shipped name (single, single-json, rubric), or a file.")
    ] = "single",
) -> None:
    """Have judges grade each answer by itself, from 1 to 10.

    Run it again with the same --out to ask only what has no verdict yet. Exit code 1 when one is missing at the end.
    """
    from chaccu.cli.judging import Inputs, RunOptions, judge_answers
    from chaccu.judge.tasks import plan_grades

    inputs = Inputs.load(options, prompt)
    tasks = plan_grades(inputs.questions, inputs.on_file, inputs.models, inputs.prompts, unit=options.by.value)
    judge_answers(tasks, inputs, RunOptions.build(options), {"command": "grade"})


def drift_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What chaccu judge compare or grade wrote.")],
    judge: Annotated[
        list[str] | None, typer.Option(help="NAME=URL[,key-env=VARIABLE] of a judge that is elsewhere now; repeat it for more.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, max=20, help="Times to ask each task, which shows the judge's noise.")] = 3,
    at_once: o.AtOnce = 4,
    timeout_s: o.Timeout = 120.0,
    api_key: o.ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON list.")] = False,
) -> None:
    """See whether the judges of a folder are still what they were.

    Twenty of each judge's tasks, picked by their hash, are judged anew and compared with the verdicts on file. Exit code 1
    where they agree less than the judge's own noise explains, or where another model answers.
    """
    import msgspec

    from chaccu.cli.judging import measure_folder

    drifts = measure_folder(folder, judge or [], repeats=repeats, at_once=at_once, timeout_s=timeout_s, api_key=api_key)
    if as_json:
        typer.echo(msgspec.json.encode(drifts).decode())
    else:
        for drift in drifts:
            _say_drift(drift)
    if any(drift.reasons for drift in drifts):
        raise typer.Exit(1)


def _say_drift(drift: Drift) -> None:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    change = "" if drift.mean_change is None else f", mean change {drift.mean_change:+.2f}"
    typer.echo(
        f"{drift.judge}: {drift.tasks} tasks x {drift.repeats}, {drift.failed} failed; agreement with the verdicts on file "
        f"{share(drift.agreement)} (limit {share(drift.limit)}), of the new ones {share(drift.repeat_agreement)}{change}"
    )
    for reason in drift.reasons:
        typer.echo(f"alarm: {drift.judge}: {reason}", err=True)
