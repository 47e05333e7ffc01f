"""`chaccu judge`: ask models the same questions, score a judge's texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chaccu.cli import judge_ask
from chaccu.cli.judge_score import score_command

if TYPE_CHECKING:
    from chaccu.judge import Answer, Asked, Failure, Question

app = typer.Typer(name="judge", help="Judge: questions to answers to verdicts.", no_args_is_help=True)
judge_ask.register(app)


@app.command(
    "run", epilog="Example: chaccu judge run --url http://127.0.0.1:8000 --model base --model tuned --out runs/answers"
)
def run_command(
    url: Annotated[str, typer.Option(help="The gateway, or any OpenAI-compatible server.")],
    model: Annotated[list[str], typer.Option(help="Name of a model to ask; repeat it for more.")],
    out: Annotated[Path, typer.Option(help="Folder to write: answers.jsonl, failures.jsonl, manifest.json.")],
    questions: Annotated[str, typer.Option(help="A shipped set (starter), or a JSONL file of questions.")] = "starter",
    api_key: Annotated[str | None, typer.Option(envvar="CHACCU_API_KEY", help="Key, if the server wants one.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token always.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed for the sampling.")] = None,
    system: Annotated[str | None, typer.Option(help="System text before each question.")] = None,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Questions asked of each model at a time.")] = 4,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Longest silence of the server, in seconds.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """Ask several models the same questions and keep their answers.

    It collects answers only; `chaccu judge score` reads a judge's verdicts on them. Run it again with the same --out to
    ask only what has no answer yet. Exit code 1 when an answer is missing at the end.
    """
    import asyncio

    import msgspec

    from chaccu.client import ChatClient, Sampling
    from chaccu.judge import collect_answers, load_questions

    loaded = load_questions(questions)
    models = list(dict.fromkeys(model))
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)

    async def ask() -> Asked:
        async with ChatClient(url, api_key, timeout_s=timeout_s) as client:
            with _progress_bar(len(models) * sum(len(question.turns) for question in loaded)) as advance:
                return await collect_answers(
                    client,
                    models,
                    loaded,
                    sampling=sampling,
                    system=system,
                    at_once=at_once,
                    file=out / "answers.jsonl",
                    on_done=advance,
                )

    asked = asyncio.run(ask())
    settings = {"url": url, "models": models, "questions": questions, "system": system, "sampling": sampling}
    _write_run(out, asked, msgspec.to_builtins(settings), loaded)
    if as_json:
        typer.echo(msgspec.json.encode(_counts(asked)).decode())
    else:
        _say_asked(asked, models, out)
    if asked.failures:
        raise typer.Exit(1)


app.command("score", epilog="Example: chaccu judge score reviews.jsonl --out scores.json")(score_command)


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[Answer | Failure], None]]:
    """A bar on stderr that goes on by one with each answer or failure."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("asking", total=total)
        yield lambda done: bar.advance(task)


def _write_run(out: Path, asked: Asked, settings: dict[str, Any], questions: Sequence[Question]) -> None:
    import msgspec

    from chaccu.artifact import Manifest, atomic_file, library_versions, sha256_json, write_manifest

    with atomic_file(out / "failures.jsonl") as file:
        file.writelines(msgspec.json.encode(failure) + b"\n" for failure in asked.failures)
    manifest = Manifest(
        kind="answers",
        name=out.name,
        inputs={"questions": sha256_json(questions)},
        settings=settings,
        facts=_counts(asked),
        versions=library_versions("openai"),
    )
    write_manifest(out, manifest)


def _counts(asked: Asked) -> dict[str, Any]:
    answered, failed = Counter(one.model for one in asked.answers), Counter(one.model for one in asked.failures)
    return {
        "asked": asked.asked,
        "answered": len(asked.answers),
        "failed": len(asked.failures),
        "reused": asked.reused,
        "models": {name: {"answered": answered[name], "failed": failed[name]} for name in sorted({*answered, *failed})},
    }


def _say_asked(asked: Asked, models: list[str], out: Path) -> None:
    width = max(len(model) for model in models)
    for model in models:
        answers = [one for one in asked.answers if one.model == model]
        failures = [one for one in asked.failures if one.model == model]
        tokens = sum(one.tokens or 0 for one in answers)
        spent_s = sum(one.total_s for one in answers)
        rate = f", {tokens:,} tokens, {tokens / spent_s:,.0f} a second within an answer" if tokens and spent_s else ""
        typer.echo(f"{model:<{width}}  {len(answers)} answered, {len(failures)} failed{rate}")
    reused = f", {asked.reused} of them on file already" if asked.reused else ""
    typer.echo(f"{asked.asked} asked = {len(asked.answers)} answered{reused} + {len(asked.failures)} failed; see {out}")
    kinds = Counter((one.model, one.cause, one.message, one.remedy) for one in asked.failures)
    for (model, cause, message, remedy), count in kinds.items():
        typer.echo(f"failed: {count} of {model}, {cause}: {message}" + (f"\n  try: {remedy}" if remedy else ""), err=True)
    if asked.failures:
        typer.echo("run the same command again to ask only what failed.", err=True)
