"""`Judging`: tasks to verdicts of one or several judges, at once, resumable, none paid twice.

Invariants: asked = parsed + unparsed + failed + over budget, one for each task and judge. `verdicts.jsonl` holds a verdict as
soon as there is one, so a kill loses what is under way and no more; what is on file or in the cache under the same key is not
asked again. Tasks of equal content are asked once. It ignores what the verdicts come to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from chaccu.judge.asking import NO_ANSWER, NOT_ASKED_AGAIN, OF_THE_JUDGE, OVER_BUDGET, JudgeSession, JudgingFailure
from chaccu.judge.budget import Estimate, count_prompt
from chaccu.judge.json_lines import JsonLinesLog, write_json_lines
from chaccu.judge.tasks import JudgeTask
from chaccu.judge.verdict_files import VERDICTS_NAME, VerdictCache
from chaccu.judge.verdicts import Verdict, read_verdicts

FAILURES_NAME = "failures.jsonl"

OnDone = Callable[[int, int], None]
"""Gets how many of the tasks are settled, and how many there are."""


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What became of all that was asked, in order; `reused` of the verdicts were on file, or copies of an equal task's."""

    asked: int
    reused: int
    verdicts: list[Verdict]
    failures: list[JudgingFailure]

    @property
    def parsed(self) -> int:
        return sum(one.is_parsed for one in self.verdicts)

    @property
    def unparsed(self) -> int:
        return len(self.verdicts) - self.parsed

    @property
    def over_budget(self) -> int:
        return sum(one.cause == OVER_BUDGET for one in self.failures)

    @property
    def failed(self) -> int:
        return len(self.failures) - self.over_budget


class _Request(msgspec.Struct):
    """Tasks of one judge that ask the same, by their places in the result."""

    session: JudgeSession
    key: str
    tasks: dict[int, JudgeTask]


class Judging:
    """The tasks, the judges and the folder of a run: first what is on file, then `estimate` and `run`."""

    def __init__(self, tasks: Sequence[JudgeTask], sessions: Sequence[JudgeSession], folder: Path, cache: VerdictCache) -> None:
        """Reads the folder and the cache. Raises `StorageError`, `DataError`, and `JudgeChangedError` where they have verdicts
        of another model than the sessions' judges."""
        self._folder = folder
        self._cache = cache
        self._results: dict[int, Verdict | JudgingFailure] = {}
        self._on_file: dict[str, Verdict] = {}
        self.asked = len(tasks) * len(sessions)
        self._requests = self._gather(tasks, sessions)
        self._todo: list[_Request] = []
        self._find_known(sessions)
        self.reused = sum(isinstance(one, Verdict) for one in self._results.values())

    def estimate(self) -> list[Estimate]:
        """What is left to ask of each judge that has something left."""
        sessions = {request.session.judge.name: request.session for request in self._todo}
        return [self._estimate(session) for session in sessions.values()]

    async def run(self, *, at_once: int = 4, on_done: OnDone | None = None) -> Judged:
        """Ask what is left, `at_once` requests of each judge at a time, and write the verdicts and failures.

        Raises `JudgeChangedError`, `StorageError`; what was said until then stays.
        """
        on_done = on_done or (lambda done, asked: None)
        on_done(len(self._results), self.asked)
        for verdict in self._on_file.values():
            # What this run is not about leaves the file and stays known.
            self._cache.keep(verdict)
        with JsonLinesLog(self._folder / VERDICTS_NAME, self._verdicts()) as log:
            try:
                async with asyncio.TaskGroup() as group:
                    for session in {id(request.session): request.session for request in self._todo}.values():
                        queue = iter([request for request in self._todo if request.session is session])
                        for _ in range(at_once):
                            group.create_task(self._work(queue, log, on_done))
            except ExceptionGroup as group_error:
                # One cause is enough: the others are the same full disk, or cancelled.
                raise group_error.exceptions[0] from None
        self._todo = []
        failures = [one for _, one in sorted(self._results.items()) if isinstance(one, JudgingFailure)]
        judged = Judged(asked=self.asked, reused=self.reused, verdicts=self._verdicts(), failures=failures)
        write_json_lines(self._folder / VERDICTS_NAME, judged.verdicts)
        write_json_lines(self._folder / FAILURES_NAME, failures)
        return judged

    def settled(self) -> Iterator[tuple[JudgeSession, JudgeTask, Verdict]]:
        """What each judge has said, of tasks of equal content once."""
        for request in self._requests:
            place, task = next(iter(request.tasks.items()))
            result = self._results.get(place)
            if isinstance(result, Verdict):
                yield request.session, task, result

    def _gather(self, tasks: Sequence[JudgeTask], sessions: Sequence[JudgeSession]) -> list[_Request]:
        """What there is to ask; a task without its answers fails here."""
        requests: dict[tuple[int, str], _Request] = {}
        for row, task in enumerate(tasks):
            for column, session in enumerate(sessions):
                place = row * len(sessions) + column
                if task.missing:
                    message = f"no answer on file of {', '.join(task.missing)}"
                    self._results[place] = session.fail(task, NO_ANSWER, message, "chaccu judge run asks for what is missing")
                    continue
                key = task.key(session.judge.name, session.settings.sampling, session.settings.structured)
                requests.setdefault((column, key), _Request(session, key, {})).tasks[place] = task
        return list(requests.values())

    def _find_known(self, sessions: Sequence[JudgeSession]) -> None:
        by_name = {session.judge.name: session for session in sessions}
        file = self._folder / VERDICTS_NAME
        earlier = read_verdicts(file) if file.exists() else []
        for verdict in earlier:
            # Copies know nothing of tokens: the one that was asked comes first.
            if (verdict.attempts or verdict.key not in self._on_file) and NOT_ASKED_AGAIN not in verdict.flags:
                self._on_file[verdict.key] = verdict
            if verdict.judge in by_name:
                by_name[verdict.judge].check_version(verdict.judge_version, "a verdict on file")
        for request in self._requests:
            known = self._on_file.get(request.key) or self._cache.find(request.key)
            if known is None:
                self._todo.append(request)
            else:
                request.session.check_version(known.judge_version, "a verdict on file or in the cache")
                self._settle(request, known)

    def _settle(self, request: _Request, result: Verdict | JudgingFailure) -> list[Verdict]:
        """Have `result` for all tasks of `request`; returns the verdicts."""
        settled = [(place, _for_task(result, task, is_copy=n > 0)) for n, (place, task) in enumerate(request.tasks.items())]
        self._results.update(settled)
        return [one for _, one in settled if isinstance(one, Verdict)]

    async def _work(self, queue: Iterator[_Request], log: JsonLinesLog, on_done: OnDone) -> None:
        for request in queue:
            result = await request.session.ask(next(iter(request.tasks.values())), request.key)
            verdicts = self._settle(request, result)
            if verdicts:
                log.append(verdicts)
                if NOT_ASKED_AGAIN not in verdicts[0].flags:
                    self._cache.keep(verdicts[0])
                self.reused += len(verdicts) - 1
            on_done(len(self._results), self.asked)

    def _verdicts(self) -> list[Verdict]:
        return [one for _, one in sorted(self._results.items()) if isinstance(one, Verdict)]

    def _estimate(self, session: JudgeSession) -> Estimate:
        tasks = [next(iter(request.tasks.values())) for request in self._todo if request.session is session]
        prompt_tokens = sum(count_prompt(session.count_tokens, task.prompt.system, task.messages()) for task in tasks)
        answer_tokens = len(tasks) * (session.settings.sampling.max_tokens or 0)
        price = session.judge.price
        return Estimate(
            judge=session.judge.name,
            requests=len(tasks),
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            cost_usd=price.cost_usd(prompt_tokens, answer_tokens) if price else None,
        )


def _for_task(result: Verdict | JudgingFailure, task: JudgeTask, *, is_copy: bool) -> Verdict | JudgingFailure:
    """What was said of an equal task, as that of `task`; a copy has taken no request of its own."""
    own: dict[str, Any] = {
        "question_id": task.question.question_id,
        "category": task.question.category,
        "turn": task.turn,
        "models": task.models,
    }
    if is_copy:
        own["attempts"] = 0
    if isinstance(result, Verdict):
        own["flags"] = (*task.flags, *(flag for flag in result.flags if flag in OF_THE_JUDGE))
        if is_copy:
            own |= {"prompt_tokens": 0, "answer_tokens": 0}
    return msgspec.structs.replace(result, **own)
