"""`JudgeTask`: one thing that judges are asked; every pair, order, turn and answer that a run is about, out of answers on file.

Invariants: a task's key is the hash of all that a judge is sent, so equal answers make equal keys whoever gave them; an answer
that is not on file makes a task that names the gap, never a task less. It ignores the judges but for their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import msgspec

from chaccu.artifact import sha256_json
from chaccu.client import Sampling
from chaccu.conversation import Message
from chaccu.errors import DataError, UsageError, did_you_mean
from chaccu.judge.answers import Answer, read_answers
from chaccu.judge.flags import find_constant, flag_answer
from chaccu.judge.prompts import JudgePrompt, Kind, choose_prompt, render_prompt
from chaccu.judge.questions import Question

Unit = Literal["turn", "conversation"]
Structured = Literal["auto", "on", "off"]
"""Whether a prompt's JSON schema goes to the endpoint; "auto": unless it is refused."""

_ANSWERS_NAME = "answers.jsonl"


class JudgeTask(msgspec.Struct, frozen=True, kw_only=True):
    """`models`: in the order in which their answers are shown; `answers`: of each, one a turn up to the one that is judged.
    `turn`: from 0, None for the whole conversation. `missing`: those of `models` that have not answered it all. `flags`: what
    is doubtful about the answers, see `judge/flags.py`."""

    question: Question
    turn: int | None
    models: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    prompt: JudgePrompt
    missing: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def messages(self) -> tuple[Message, ...]:
        """What a judge is sent beside the system text of the prompt."""
        return render_prompt(self.prompt, self.question, self.turn, self.answers, self.question.reference)

    def key(self, judge: str, sampling: Sampling, structured: Structured = "auto") -> str:
        """SHA-256 of all that is asked: the judge, the prompt, its texts with question, answers and reference, the sampling,
        and whether its schema goes with it, if it has one."""
        asked = [judge, self.prompt.sha256, self.prompt.system, self.messages(), sampling]
        return sha256_json(asked if self.prompt.schema is None or structured == "auto" else [*asked, structured])


class AnswersOnFile:
    """The answers on file, by model and question."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        """Raises `DataError` where a model has two different answers to one turn."""
        self._answers: dict[tuple[str, int | str], dict[int, Answer]] = {}
        for one in answers:
            turns = self._answers.setdefault((one.model, one.question_id), {})
            if turns.setdefault(one.turn, one).text != one.text:
                raise DataError(
                    f"{one.model} has two different answers to turn {one.turn} of question {one.question_id}.",
                    remedy="give the folders of one run a model, or other names to the models",
                )
        self.models = list(dict.fromkeys(model for model, _ in self._answers))
        self.questions = {question for _, question in self._answers}
        self._constant = {model: self._find_constant(model) for model in self.models}

    def choose_models(self, wanted: Sequence[str]) -> list[str]:
        """Those of `wanted` in their order, or all. Raises `UsageError` for one without answers."""
        for name in wanted:
            if name not in self.models:
                raise UsageError(f"there are no answers of {name!r}.", remedy=did_you_mean(name, self.models))
        return list(dict.fromkeys(wanted)) or self.models

    def up_to(self, model: str, question: Question, last: int) -> tuple[str, ...] | None:
        """A model's answers to the turns 0 to `last`, None where one is missing."""
        turns = self._answers.get((model, question.question_id), {})
        return tuple(turns[turn].text for turn in range(last + 1)) if turns.keys() >= set(range(last + 1)) else None

    def flags(self, model: str, question: Question, last: int) -> list[str]:
        """What is doubtful about these answers; the same text to many questions is "constant"."""
        turns = self._answers.get((model, question.question_id), {})
        answers = [turns[turn] for turn in range(last + 1) if turn in turns]
        flags: list[str] = [flag for answer in answers for flag in flag_answer(answer.text, answer.finish_reason)]
        return [*flags, "constant"] if any(answer.text in self._constant[model] for answer in answers) else flags

    def _find_constant(self, model: str) -> set[str]:
        answers = [one for (name, _), turns in self._answers.items() if name == model for one in turns.values()]
        return find_constant((one.question_id, one.text) for one in answers)


def read_answer_files(paths: Sequence[Path]) -> list[Answer]:
    """The answers of folders that `chaccu judge run` wrote, or of files such as theirs. Raises `StorageError`, `DataError`."""
    return [answer for path in paths for answer in read_answers(find_answers(path))]


def find_answers(path: Path) -> Path:
    """The file of answers: `path`, or the one in it."""
    return path / _ANSWERS_NAME if path.is_dir() else path


def plan_comparisons(
    questions: Sequence[Question],
    on_file: AnswersOnFile,
    models: Sequence[str],
    prompts: Sequence[JudgePrompt],
    *,
    baseline: str | None = None,
    both_orders: bool = True,
    unit: Unit = "turn",
) -> list[JudgeTask]:
    """Every pair of `models`, or each against `baseline` (shown first where only one order is), on every question.

    Raises `UsageError` where there is no pair, or no prompt that fits.
    """
    if baseline is not None:
        pairs = [(baseline, model) for model in models if model != baseline]
    else:
        pairs = list(combinations(models, 2))
    if not pairs:
        raise UsageError(f"there is nothing to compare {', '.join(models)} with.", remedy="answers of two models or more")
    orders = [order for pair in pairs for order in ([pair, pair[::-1]] if both_orders else [pair])]
    return _plan("pairwise", questions, on_file, orders, prompts, unit)


def plan_grades(
    questions: Sequence[Question],
    on_file: AnswersOnFile,
    models: Sequence[str],
    prompts: Sequence[JudgePrompt],
    *,
    unit: Unit = "turn",
) -> list[JudgeTask]:
    """Every model by itself, on every question. Raises `UsageError` where no prompt fits."""
    return _plan("single", questions, on_file, [(model,) for model in models], prompts, unit)


def _plan(
    kind: Kind,
    questions: Sequence[Question],
    on_file: AnswersOnFile,
    groups: Sequence[tuple[str, ...]],
    prompts: Sequence[JudgePrompt],
    unit: Unit,
) -> list[JudgeTask]:
    tasks = []
    for question in questions:
        turns: Sequence[int | None] = range(len(question.turns)) if unit == "turn" else [None]
        for turn in turns:
            last = len(question.turns) - 1 if turn is None else turn
            has_reference = question.reference is not None and len(question.reference) > last
            prompt = choose_prompt(prompts, kind, question, turn, has_reference=has_reference)
            for models in groups:
                flags = [flag for model in models if model in on_file.models for flag in on_file.flags(model, question, last)]
                answers = [on_file.up_to(model, question, last) for model in models]
                task = JudgeTask(
                    question=question,
                    turn=turn,
                    models=models,
                    answers=tuple(answer or () for answer in answers),
                    prompt=prompt,
                    missing=tuple(model for model, answer in zip(models, answers, strict=True) if answer is None),
                    flags=tuple(sorted(set(flags))),
                )
                tasks.append(task)
    return tasks
