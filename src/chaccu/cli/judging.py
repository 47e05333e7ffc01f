"""What the judging commands do once their options are read: inputs from disk, the run with its bar, what is said of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import typer

from chaccu.artifact import MANIFEST_NAME, Manifest, read_manifest, sha256_file, sha256_json, storage_errors
from chaccu.cli.judge_options import JudgeOptions
from chaccu.cli.progress_bar import counting
from chaccu.client import ChatClient, ChatError, Sampling
from chaccu.errors import DataError, UsageError, did_you_mean
from chaccu.file_lock import lock_folder
from chaccu.judge import Question
from chaccu.judge.asking import AskSettings, JudgeSession
from chaccu.judge.budget import Budget, CountTokens, Estimate, Price, count_by_bytes, read_prices
from chaccu.judge.drift import Drift, measure_drift, read_canaries, write_canaries
from chaccu.judge.judges import Judge, parse_judges
from chaccu.judge.judging import Judged, Judging
from chaccu.judge.judging_manifest import drop_manifest, read_judge_versions, write_judging_manifest
from chaccu.judge.prompts import JudgePrompt, load_prompts, with_criteria
from chaccu.judge.questions import load_question_sets
from chaccu.judge.tasks import AnswersOnFile, JudgeTask, find_answers, read_answer_files
from chaccu.judge.verdict_files import CACHE_NAME, VerdictCache


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What is judged: answers on file, the questions that they answer, the models, the prompts to choose from."""

    hashes: dict[str, str]
    questions_name: str
    questions: list[Question]
    on_file: AnswersOnFile
    models: list[str]
    prompts: list[JudgePrompt]

    @classmethod
    def load(cls, options: JudgeOptions, prompt: str) -> Inputs:
        """Read them all. Raises `UsageError`, `DataError`, `StorageError`."""
        on_file = AnswersOnFile(read_answer_files(options.answers))
        sources = [options.questions] if options.questions else questions_of(options.answers[0])
        loaded = load_question_sets(sources)
        name = ", ".join(sources)
        asked = [one for one in loaded if not (options.no_checked and one.checks)]
        if not on_file.questions & {one.question_id for one in asked}:
            raise DataError(
                f"none of the {len(asked)} questions of {name} has an answer in {', '.join(map(str, options.answers))}.",
                remedy="--questions with the set that was answered",
            )
        warn_of_changes(options.answers, sources, loaded, "judges see the questions as they are now")
        return cls(
            hashes={
                "questions": sha256_json(loaded),
                **{f"answers {path}": sha256_file(find_answers(path)) for path in options.answers},
            },
            questions_name=name,
            questions=asked,
            on_file=on_file,
            models=on_file.choose_models(options.model or []),
            prompts=_load_prompts(prompt, options.criteria),
        )


def warn_of_changes(answers: Sequence[Path], sources: Sequence[str], loaded: Sequence[Question], effect: str) -> None:
    """Where an answers folder was asked these sets or files, and they were others then."""
    sha256 = sha256_json(loaded)
    for path in answers:
        manifest = _find_manifest(path)
        if manifest and _sources_of(manifest) == sources and manifest.inputs.get("questions", sha256) != sha256:
            changed = f"{', '.join(sources)} has changed since {path} was answered"
            typer.echo(f"warning: {changed}; {effect}.", err=True)


def _load_prompts(name: str, criteria: Path | None) -> list[JudgePrompt]:
    prompts = load_prompts(name)
    if criteria is None:
        return prompts
    if not any("{criteria}" in one.template for one in prompts):
        raise UsageError(f"the prompt {name} shows no criteria, and --criteria gives some.", remedy="--prompt rubric")
    with storage_errors(criteria):
        data = criteria.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{criteria} is no text in UTF-8: {error}.", remedy="write the criteria as plain text") from error
    return [with_criteria(one, text) for one in prompts]


def questions_of(path: Path) -> list[str]:
    """The sets or files that an answers folder, or the folder of an answers file, says were asked. Raises `UsageError`."""
    manifest = _find_manifest(path)
    sources = _sources_of(manifest) if manifest else []
    if not sources:
        # No set is taken for granted: ids such as 1 are in many.
        raise UsageError(
            f"{path} does not say which questions it answers: it has no {MANIFEST_NAME}.",
            remedy="--questions with the set or file that was answered, or end its chaccu judge run first",
        )
    return sources


def _find_manifest(path: Path) -> Manifest | None:
    folder = path if path.is_dir() else path.parent
    return read_manifest(folder, kind="answers") if (folder / MANIFEST_NAME).is_file() else None


def _sources_of(manifest: Manifest) -> list[str]:
    named = manifest.settings.get("questions", [])
    return [named] if isinstance(named, str) else list(named)


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How it is judged: the options as they were given, and what they come to."""

    given: JudgeOptions
    judges: list[Judge]
    ask: AskSettings
    count_tokens: CountTokens
    counted_by: str

    @classmethod
    def build(cls, given: JudgeOptions) -> RunOptions:
        """Raises `UsageError`, `DataError`, `StorageError`, `TokenizerError`."""
        if (given.price_in is None) != (given.price_out is None):
            raise UsageError("one of --price-in and --price-out is missing.", remedy="give both; a free side costs 0")
        of_all = None if given.price_in is None or given.price_out is None else Price(given.price_in, given.price_out)
        prices = read_prices(given.prices) if given.prices else None
        judges = parse_judges(given.judge, given.url, prices=prices, price=of_all)
        without = [one.name for one in judges if one.price is None]
        if given.max_cost is not None and without:
            raise UsageError(
                f"--max-cost cannot be kept: {', '.join(without)} has no price.",
                remedy="--price-in and --price-out, or --prices",
            )
        sampling = Sampling(max_tokens=given.max_tokens, temperature=given.temperature, seed=given.seed)
        return cls(
            given=given,
            judges=judges,
            ask=AskSettings(sampling=sampling, again=given.again, structured=given.structured.value),
            count_tokens=_count_with(given.tokenizer) if given.tokenizer else count_by_bytes,
            counted_by=f"counted by {given.tokenizer}" if given.tokenizer else "bytes / 4",
        )


def _count_with(path: Path) -> CountTokens:
    from chaccu.conversation.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.load(path)
    return lambda texts: sum(tokenizer.count_texts(texts, first=[True] * len(texts)))


def _open_client(judge: Judge, api_key: str | None, timeout_s: float) -> ChatClient:
    """Raises `UsageError` where the judge's variable holds no key."""
    return ChatClient(judge.url, judge.find_key(api_key), timeout_s=timeout_s)


def judge_answers(tasks: Sequence[JudgeTask], inputs: Inputs, options: RunOptions, settings: dict[str, Any]) -> None:
    """Run it, write the folder, say what came of it; `typer.Exit` 1 when a verdict is missing."""
    given = options.given
    if options.ask.structured == "on" and not all(task.prompt.schema for task in tasks):
        name = next(task.prompt.name for task in tasks if not task.prompt.schema)
        raise UsageError(f"--structured on: the prompt {name} has no schema.", remedy="--prompt pair-json or single-json")
    settings |= {
        "by": given.by.value,
        "judges": [{"name": one.name, "url": one.url} for one in options.judges],
        "questions": inputs.questions_name,
        "without_checked": given.no_checked,
        "models": inputs.models,
        "ask": msgspec.to_builtins(options.ask),
    }
    try:
        facts = asyncio.run(_run(tasks, inputs, options, settings))
    except KeyboardInterrupt:
        typer.echo(f"what was said until now is in {given.out}; run the same command again to ask the rest.", err=True)
        raise
    if facts is None:
        return
    if given.as_json:
        typer.echo(msgspec.json.encode(facts).decode())
    if facts["failed"] or facts["over_budget"]:
        raise typer.Exit(1)


async def _run(
    tasks: Sequence[JudgeTask], inputs: Inputs, options: RunOptions, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """The manifest's facts, or None for an estimate alone."""
    given = options.given
    budget = Budget(given.max_cost)
    async with AsyncExitStack() as stack:
        if not given.estimate:
            stack.enter_context(lock_folder(given.out))
        versions = read_judge_versions(given.out)
        sessions = []
        for judge in options.judges:
            client = await stack.enter_async_context(_open_client(judge, given.api_key, given.timeout_s))
            session = JudgeSession(
                judge,
                client,
                options.ask,
                budget=budget,
                version=versions.get(judge.name),
                count_tokens=options.count_tokens,
                on_retry=_say_retry,
            )
            sessions.append(session)
        judging = Judging(tasks, sessions, given.out, VerdictCache(given.cache or given.out / CACHE_NAME))
        _say_estimate(judging, options)
        if given.estimate:
            return None
        drop_manifest(given.out)
        with counting("judging") as advance:
            judged = await judging.run(at_once=given.at_once, on_done=advance)
        write_canaries(given.out, judging.settled())
        manifest = write_judging_manifest(
            given.out, judged, sessions, inputs=inputs.hashes, settings=settings, spent_usd=budget.spent_usd
        )
    if not given.as_json:
        _say_judged(judged, manifest.facts, given.out)
    return manifest.facts


def _say_retry(judge: str, error: ChatError, wait_s: float) -> None:
    typer.echo(f"{judge}, {error.cause}: asked again in {wait_s:.1f} s", err=True)


def _say_estimate(judging: Judging, options: RunOptions) -> None:
    estimates = judging.estimate()
    if options.given.estimate and options.given.as_json:
        typer.echo(msgspec.json.encode({"counted_by": options.counted_by, "judges": estimates}).decode())
        return
    left = sum(one.requests for one in estimates)
    for one in estimates:
        _say(options, _describe_estimate(one, options.counted_by))
    costs = [one.cost_usd for one in estimates if one.cost_usd is not None]
    cost = f", at most {sum(costs):,.4f} USD beside what is asked again" if costs else ""
    _say(options, f"{judging.asked} to judge, {judging.reused} of them on file; {left} requests to send{cost}")


def _describe_estimate(one: Estimate, counted_by: str) -> str:
    cost = "" if one.cost_usd is None else f", at most {one.cost_usd:,.4f} USD"
    return (
        f"{one.judge}: {one.requests} requests, about {one.prompt_tokens:,} tokens to read ({counted_by}), "
        f"at most {one.answer_tokens:,} to write{cost}"
    )


def _say(options: RunOptions, text: str) -> None:
    """An estimate is the result where it alone was asked for, else it goes with the progress."""
    typer.echo(text, err=not options.given.estimate)


def _say_judged(judged: Judged, facts: dict[str, Any], out: Path) -> None:
    for name, counts in facts["judges"].items():
        version = f" ({counts['version']})" if counts["version"] not in (None, name) else ""
        cost = f", {counts['cost_usd']:,.4f} USD" if "cost_usd" in counts else ""
        unknown = f", {counts['without_usage']} without their tokens" if counts["without_usage"] else ""
        typer.echo(
            f"{name}{version}: {counts['parsed']} parsed, {counts['unparsed']} unparsed, {counts['not_judged']} without a "
            f"verdict; {counts['prompt_tokens']:,} tokens read, {counts['answer_tokens']:,} written{unknown}{cost}"
        )
    spent = f"; this run cost {facts['spent_usd']:,.4f} USD" if "spent_usd" in facts else ""
    typer.echo(
        f"{judged.asked} asked = {judged.parsed} parsed + {judged.unparsed} unparsed + {judged.failed} failed + "
        f"{judged.over_budget} over budget, {judged.reused} of them known before{spent}; see {out}"
    )
    kinds = Counter((one.judge, one.cause, one.message, one.remedy) for one in judged.failures)
    for (judge, cause, message, remedy), count in kinds.items():
        typer.echo(f"{count} of {judge}, {cause}: {message}" + (f"\n  try: {remedy}" if remedy else ""), err=True)
    if judged.failures:
        typer.echo("run the same command again to ask only what has no verdict.", err=True)


def measure_folder(
    folder: Path, moved: Sequence[str], *, repeats: int, at_once: int, timeout_s: float, api_key: str | None
) -> list[Drift]:
    """The drift of each judge of a judging folder; `moved`: judges that are elsewhere now."""
    canaries = read_canaries(folder)
    elsewhere = {judge.name: judge for judge in parse_judges(moved, None)}
    known = {canary.judge for canary in canaries}
    for name in elsewhere:
        if name not in known:
            raise UsageError(f"{folder} has no verdict of {name!r}.", remedy=did_you_mean(name, known))

    async def measure() -> list[Drift]:
        async with AsyncExitStack() as stack:
            sessions = {}
            for one in {canary.judge: canary for canary in canaries}.values():
                judge = elsewhere.get(one.judge) or Judge(one.judge, one.url, one.key_variable)
                client = await stack.enter_async_context(_open_client(judge, api_key, timeout_s))
                sessions[one.judge] = JudgeSession(judge, client, one.ask, on_retry=_say_retry)
            with counting("judging anew") as advance:
                return await measure_drift(canaries, sessions, repeats=repeats, at_once=at_once, on_done=advance)

    return asyncio.run(measure())
