"""`measure_drift`: the same few tasks judged anew, to see whether a judge is still the one that it was.

Invariants: the tasks are picked by their hash, so no one chooses them; the judge's own noise is measured beside the change, by
asking several times. It ignores which of the verdicts was right.

The limit: if nothing has changed, the verdict on file is one draw like the new ones, each as likely to be the odd one out.
The share of new verdicts that agree with the one on file has then a distribution that the draws themselves give (an exact
permutation test in each task), and an agreement that would come by chance in less than `CHANCE` of cases is an alarm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import msgspec

from chaccu.errors import DataError
from chaccu.judge.asking import AskSettings, JudgeSession, JudgingFailure
from chaccu.judge.json_lines import read_json_lines, write_json_lines
from chaccu.judge.judging import OnDone
from chaccu.judge.tasks import JudgeTask
from chaccu.judge.verdicts import Outcome, Verdict

CANARIES_NAME = "canaries.jsonl"
CANARIES = 20
CHANCE = 0.02


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """A task with all that asks it again, and what was said of it."""

    key: str
    judge: str
    url: str
    key_variable: str | None
    version: str | None
    ask: AskSettings
    task: JudgeTask
    outcome: Outcome | None
    scores: tuple[float, ...] | None


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """One judge, now and then.

    `tasks`: that every repeat has a verdict of; `failed`: those that have not. `agreement`: share of new verdicts that say what
    the one on file says; `repeat_agreement`: share of pairs of new verdicts on one task that agree;
    `limit`: the least agreement that is no alarm. `mean_change`: of the first score, new less old, where there are scores.
    `reasons`: why there is an alarm, none if there is none.
    """

    judge: str
    tasks: int
    failed: int
    repeats: int
    agreement: float | None
    repeat_agreement: float | None
    limit: float | None
    mean_change: float | None
    version_then: str | None
    version_now: str | None
    reasons: tuple[str, ...]


def write_canaries(folder: Path, settled: Iterable[tuple[JudgeSession, JudgeTask, Verdict]]) -> None:
    """Keep those `CANARIES` of each judge's parsed verdicts whose keys are the smallest. Raises `StorageError`."""
    by_judge: dict[str, list[Canary]] = {}
    for session, task, verdict in settled:
        if verdict.is_parsed:
            canary = Canary(
                key=verdict.key,
                judge=verdict.judge,
                url=session.judge.url,
                key_variable=session.judge.key_variable,
                version=verdict.judge_version,
                ask=session.settings,
                task=task,
                outcome=verdict.outcome,
                scores=verdict.scores,
            )
            by_judge.setdefault(verdict.judge, []).append(canary)
    chosen = [sorted(canaries, key=lambda one: one.key)[:CANARIES] for canaries in by_judge.values()]
    write_json_lines(folder / CANARIES_NAME, (canary for canaries in chosen for canary in canaries))


def read_canaries(folder: Path) -> list[Canary]:
    """What `write_canaries` kept. Raises `StorageError`, `DataError` where there is nothing or something else."""
    file = folder / CANARIES_NAME
    canaries = read_json_lines(file, Canary, "canary")
    if not canaries:
        raise DataError(f"{folder} has no parsed verdict to compare with.", remedy="judge something first")
    for canary in canaries:
        if canary.task.key(canary.judge, canary.ask.sampling, canary.ask.structured) != canary.key:
            raise DataError(
                f"{file} was written by a version of Chaccu that asks in other words.",
                remedy="run the judging of this folder again; what changed would not be the judge",
            )
    return canaries


async def measure_drift(
    canaries: Sequence[Canary],
    sessions: Mapping[str, JudgeSession],
    *,
    repeats: int = 3,
    at_once: int = 4,
    on_done: OnDone | None = None,
) -> list[Drift]:
    """Ask every task `repeats` times anew, and compare; one result for each judge.

    `repeats`: 2 or more, for of two verdicts that differ neither is the odd one. `sessions`: by judge's name, without a pinned
    version. Raises `JudgeChangedError` where a judge changes in between.
    """
    queue = iter([(canary, number) for number in range(repeats) for canary in canaries])
    said: dict[tuple[str, int], Verdict | JudgingFailure] = {}

    async def work(queue: Iterator[tuple[Canary, int]]) -> None:
        for canary, number in queue:
            said[canary.key, number] = await sessions[canary.judge].ask(canary.task, canary.key)
            if on_done:
                on_done(len(said), repeats * len(canaries))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work(queue))
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    judges = dict.fromkeys(canary.judge for canary in canaries)
    return [_compare([one for one in canaries if one.judge == judge], said, repeats) for judge in judges]


def _compare(canaries: Sequence[Canary], said: Mapping[tuple[str, int], Verdict | JudgingFailure], repeats: int) -> Drift:
    draws: list[tuple[object, ...]] = []
    changes: list[float] = []
    versions = set()
    for canary in canaries:
        new = [one for number in range(repeats) if isinstance(one := said[canary.key, number], Verdict)]
        versions |= {one.judge_version for one in new}
        if len(new) == repeats:
            draws.append((canary.outcome or canary.scores, *(one.outcome or one.scores for one in new)))
            changes += [one.scores[0] - canary.scores[0] for one in new if one.scores and canary.scores]
    version = next((one for one in versions if one is not None), None)
    version_then = next((one.version for one in canaries if one.version is not None), None)
    reasons = []
    if version is not None and version_then is not None and version != version_then:
        reasons.append(f"the server answers as {version}, and answered as {version_then}")
    if not draws:
        reasons.append("no task has all its verdicts")
    elif (repeats + 1) ** len(draws) * CHANCE < 1:
        # Were all of them other than those on file, even that would come by chance too often to be told.
        reasons.append(f"{len(draws)} tasks with {repeats} new verdicts each are too few to tell")
    agreed = sum(_agreements(one)[0] for one in draws)
    most = repeats * len(draws)
    limit = agreement_limit(draws, CHANCE) if draws else 0
    if agreed < limit:
        reasons.append(f"{agreed} of {most} new verdicts agree with those on file, and {limit} is the least for this judge")
    pairs = [first == second for one in draws for first, second in combinations(one[1:], 2)]
    return Drift(
        judge=canaries[0].judge,
        tasks=len(draws),
        failed=len(canaries) - len(draws),
        repeats=repeats,
        agreement=agreed / most if draws else None,
        repeat_agreement=sum(pairs) / len(pairs) if pairs else None,
        limit=limit / most if draws else None,
        mean_change=sum(changes) / len(changes) if changes else None,
        version_then=version_then,
        version_now=version,
        reasons=tuple(reasons),
    )


def agreement_limit(draws: Sequence[Sequence[object]], chance: float) -> int:
    """The least count of agreements with the first of each task's draws that comes by chance often enough.

    Fewer have a probability of at most `chance` where any of a task's draws is as likely to stand first.
    """
    odds = {0: Fraction(1)}
    for one in draws:
        counts = _agreements(one)
        summed: dict[int, Fraction] = {}
        for total, odd in odds.items():
            for count in counts:
                summed[total + count] = summed.get(total + count, Fraction(0)) + odd / len(counts)
        odds = summed
    below = Fraction(0)
    for total in sorted(odds):
        below += odds[total]
        if below > chance:
            return total
    return max(odds)


def _agreements(draws: Sequence[object]) -> list[int]:
    """For each draw, how many of the others are equal to it."""
    return [sum(one == other for other in draws) - 1 for one in draws]
