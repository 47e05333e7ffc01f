"""`chaccu judge run`, `questions` and `check`: what is asked, the answers, and the rules that they meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from chaccu.client import ChatError, Sampling
    from chaccu.judge import Asked, Question
    from chaccu.judge.addresses import ModelAddress
    from chaccu.judge.checking import CheckCount

_STARTER = "starter"
_QUESTIONS = "A shipped set (chaccu judge questions lists them), a file, or FORM:FILE[,REFERENCES]; repeat it for more."
_AGAIN = "Times that a turn is asked again after a failure that may pass: HTTP 429 or 5xx, a lost connection, a time-out."


def register(app: typer.Typer) -> None:
    """Add the commands to `chaccu judge`."""
    app.command(
        "run", epilog="Example: chaccu judge run --url http://127.0.0.1:8000 --model base --model tuned --out runs/answers"
    )(run_command)
    app.command("questions", epilog="Example: chaccu judge questions")(questions_command)
    app.command("check", epilog="Example: chaccu judge check runs/answers --questions checked")(check_command)


def run_command(
    model: Annotated[list[str], typer.Option(help="Model to ask, NAME or NAME=URL[,key-env=VARIABLE]; repeat it for more.")],
    out: Annotated[Path, typer.Option(help="Folder to write: answers.jsonl, failures.jsonl, manifest.json.")],
    url: Annotated[str | None, typer.Option(help="Server of the models that name none; any OpenAI-compatible one.")] = None,
    questions: Annotated[list[str] | None, typer.Option(help=_QUESTIONS, show_default=_STARTER)] = None,
    api_key: Annotated[str | None, typer.Option(envvar="CHACCU_API_KEY", help="Key, if the server wants one.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="Of all questions; else each has its own.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for the sampling.")] = None,
    system: Annotated[str | None, typer.Option(help="System text before each question.")] = None,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Questions asked of each model at a time.")] = 4,
    retries: Annotated[int, typer.Option(min=0, max=100, help=_AGAIN)] = 5,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Longest silence of the server, in seconds.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """Ask several models the same questions and keep their answers.

    Run it again with the same --out to ask only what has no answer yet. Exit code 1 when an answer is missing at the end.
    `chaccu judge check` checks the answers by rules, where the questions have some.
    """
    import msgspec

    from chaccu.client import Sampling
    from chaccu.judge.addresses import parse_addresses
    from chaccu.judge.questions import SET_VERSIONS, load_question_sets

    sources = list(dict.fromkeys(questions or [_STARTER]))
    loaded = load_question_sets(sources)
    addresses = parse_addresses(model, url)
    models = [one.name for one in addresses]
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    settings = {
        "urls": {one.name: one.url for one in addresses},
        "models": models,
        "questions": sources[0] if len(sources) == 1 else sources,
        "question_set_versions": {name: SET_VERSIONS[name] for name in sources if name in SET_VERSIONS},
        "system": system,
        "sampling": sampling,
    }
    ask = partial(
        _ask,
        addresses,
        loaded,
        sampling,
        system,
        out / "answers.jsonl",
        api_key=api_key,
        at_once=at_once,
        retries=retries,
        timeout_s=timeout_s,
    )
    asked = _ask_alone(out, ask, msgspec.to_builtins(settings), loaded)
    if as_json:
        typer.echo(msgspec.json.encode(_counts(asked)).decode())
    else:
        _say_asked(asked, models, out)
    if asked.failures:
        raise typer.Exit(1)


def _ask_alone(
    out: Path, ask: Callable[[], Coroutine[Any, Any, Asked]], settings: dict[str, Any], questions: Sequence[Question]
) -> Asked:
    """Ask and write the folder, which no other run may write to meanwhile."""
    import asyncio

    from chaccu.artifact import MANIFEST_NAME, read_manifest
    from chaccu.file_lock import lock_folder

    with lock_folder(out):
        if (out / MANIFEST_NAME).is_file():
            # The failures and the manifest of a judging folder have the same names, and would be lost.
            read_manifest(out, kind="answers")
        try:
            asked = asyncio.run(ask())
        except KeyboardInterrupt:
            typer.echo(f"what was answered until now is in {out}; run the same command again to ask the rest.", err=True)
            raise
        _write_run(out, asked, settings, questions)
    return asked


async def _ask(
    addresses: Sequence[ModelAddress],
    questions: Sequence[Question],
    sampling: Sampling,
    system: str | None,
    file: Path,
    *,
    api_key: str | None,
    at_once: int,
    retries: int,
    timeout_s: float,
) -> Asked:
    from contextlib import AsyncExitStack

    from chaccu.cli.progress_bar import counting
    from chaccu.client import ChatClient
    from chaccu.judge import collect_answers
    from chaccu.judge.retry import RetryPolicy

    total = len(addresses) * sum(len(question.turns) for question in questions)
    done = 0
    async with AsyncExitStack() as stack:
        clients = {}
        for one in addresses:
            client = ChatClient(one.url, one.find_key(api_key), timeout_s=timeout_s)
            clients[one.name] = await stack.enter_async_context(client)
        advance = stack.enter_context(counting("asking"))

        def count_one(_: Any) -> None:
            nonlocal done
            done += 1
            advance(done, total)

        return await collect_answers(
            clients,
            list(clients),
            questions,
            sampling=sampling,
            system=system,
            at_once=at_once,
            file=file,
            retry=RetryPolicy(tries=retries + 1),
            on_done=count_one,
            on_retry=_say_retry,
        )


def _say_retry(model: str, question: Question, turn: int, error: ChatError, wait_s: float) -> None:
    typer.echo(f"question {question.question_id} of {model}, {error.cause}: asked again in {wait_s:.1f} s", err=True)


def questions_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """List the shipped sets of questions with their versions and counts by category."""
    import msgspec

    from chaccu.judge import list_question_sets, load_questions
    from chaccu.judge.questions import SET_VERSIONS

    sets = {name: load_questions(name) for name in list_question_sets()}
    if as_json:
        counts = {name: Counter(one.category for one in loaded) for name, loaded in sets.items()}
        typer.echo(msgspec.json.encode(counts).decode())
        return
    for name, loaded in sets.items():
        checked, references = sum(bool(one.checks) for one in loaded), sum(one.reference is not None for one in loaded)
        typer.echo(
            f"{name}, version {SET_VERSIONS[name]}: {len(loaded)} questions, {references} with a reference answer, "
            f"{checked} with rules to check by"
        )
        for category, count in Counter(one.category for one in loaded).items():
            typer.echo(f"  {category:<16}{count:>4}")


def check_command(
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="Folder that chaccu judge run wrote.")],
    questions: Annotated[
        list[str] | None, typer.Option(help=_QUESTIONS, show_default="what the folder's manifest says")
    ] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run the Python code of answers too, each in a process that can only compute.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """Check answers by the rules of their questions: numbers, exact words, formats, code.

    Writes checks.jsonl into the folder, a question and model a line. Shares come with their 95 % intervals (Wilson). A model's
    code is run only with --run-code: nobody has read it. Without it such questions are counted as unchecked.
    """
    import msgspec

    from chaccu.artifact import read_manifest
    from chaccu.cli.judging import questions_of, warn_of_changes
    from chaccu.cli.progress_bar import counting
    from chaccu.errors import DataError
    from chaccu.judge import read_answers
    from chaccu.judge.checking import check_answers, count_checks
    from chaccu.judge.json_lines import write_json_lines
    from chaccu.judge.questions import load_question_sets

    settings = read_manifest(answers, kind="answers").settings
    sources = questions or questions_of(answers)
    every = load_question_sets(sources)
    effect = "answers are checked by the questions as they are now; the same chaccu judge run asks again what reads otherwise"
    warn_of_changes([answers], sources, every, effect)
    loaded = [one for one in every if one.checks]
    if not loaded:
        raise DataError(f"no question of {', '.join(sources)} has rules to check by.", remedy="--questions checked, for one")
    on_file = read_answers(answers / "answers.jsonl")
    names = {one.question_id for one in loaded}
    # Earlier runs into the folder may have asked other models.
    models = list(dict.fromkeys([*settings["models"], *(one.model for one in on_file if one.question_id in names)]))
    with counting("checking") as advance:
        done = Counter[str]()

        def count_one(_: Any) -> None:
            done["all"] += 1
            advance(done["all"], len(loaded) * len(models))

        results = check_answers(loaded, on_file, models, run_code=run_code, on_done=count_one)
    write_json_lines(answers / "checks.jsonl", results)
    counts = count_checks(results)
    if as_json:
        typer.echo(msgspec.json.encode({"questions": sources, "counts": counts}).decode())
    else:
        for count in counts:
            typer.echo(_describe_count(count))


def _describe_count(count: CheckCount) -> str:
    from chaccu.judge.checking import ALL_CATEGORIES

    place = count.model if count.category == ALL_CATEGORIES else f"  {count.category}"
    share = "nothing checked"
    if count.share is not None and count.interval is not None:
        low, high = count.interval
        share = f"{100 * count.share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    others = {"unchecked": count.unchecked, "missing": count.missing}
    more = "".join(f", {number} {name}" for name, number in others.items() if number)
    return f"{place:<18} {share}: {count.passed} passed, {count.failed} failed{more}"


def _write_run(out: Path, asked: Asked, settings: dict[str, Any], questions: Sequence[Question]) -> None:
    from chaccu.artifact import Manifest, library_versions, sha256_json, write_manifest
    from chaccu.judge.json_lines import write_json_lines

    write_json_lines(out / "failures.jsonl", asked.failures)
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
    models = sorted({one.model for one in asked.answers} | {one.model for one in asked.failures})
    return {
        "asked": asked.asked,
        "answered": len(asked.answers),
        "failed": len(asked.failures),
        "reused": asked.reused,
        "models": {model: _count_model(asked, model) for model in models},
    }


def _count_model(asked: Asked, model: str) -> dict[str, int]:
    """`empty` and `cut_off` are among the answered."""
    from chaccu.judge.flags import CUT_REASONS

    answers = [one for one in asked.answers if one.model == model]
    return {
        "answered": len(answers),
        "failed": sum(one.model == model for one in asked.failures),
        "empty": sum(not one.text.strip() for one in answers),
        "cut_off": sum(one.finish_reason in CUT_REASONS for one in answers),
    }


def _say_asked(asked: Asked, models: list[str], out: Path) -> None:
    width = max(len(model) for model in models)
    for model in models:
        answers = [one for one in asked.answers if one.model == model]
        counts = _count_model(asked, model)
        among = [f"{counts[name]} {said}" for name, said in (("empty", "empty"), ("cut_off", "cut off")) if counts[name]]
        tokens = sum(one.tokens or 0 for one in answers)
        spent_s = sum(one.total_s for one in answers)
        rate = f", {tokens:,} tokens, {tokens / spent_s:,.0f} a second within an answer" if tokens and spent_s else ""
        doubtful = f" ({', '.join(among)})" if among else ""
        typer.echo(f"{model:<{width}}  {counts['answered']} answered{doubtful}, {counts['failed']} failed{rate}")
    reused = f", {asked.reused} of them on file already" if asked.reused else ""
    typer.echo(f"{asked.asked} asked = {len(asked.answers)} answered{reused} + {len(asked.failures)} failed; see {out}")
    kinds = Counter((one.model, one.cause, one.message, one.remedy) for one in asked.failures)
    for (model, cause, message, remedy), count in kinds.items():
        typer.echo(f"failed: {count} of {model}, {cause}: {message}" + (f"\n  try: {remedy}" if remedy else ""), err=True)
    if asked.failures:
        typer.echo("run the same command again to ask only what failed.", err=True)
