"""`Question` and the sets of them: shipped ones by name, others out of files.

Invariants: the ids of a set are unique, as texts too, and every question has at least one turn with text; a file that breaks
this is refused with its line. It ignores fields that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import DataError, UsageError, did_you_mean
from chaccu.judge.checks import Check
from chaccu.judge.question_files import FORMS, QuestionLine, read_question_file, read_references

STARTER = "starter"
_GENERIC = "generic"

SET_VERSIONS = {"chaccu-100": 2, "checked": 2, "starter": 1}
"""Of the shipped sets; one more whenever a question's text, reference or rule changes. Figures compare within a version."""

CATEGORY_TEMPERATURES = {
    "counterfactual": 0.7,
    "generic": 0.7,
    "roleplay": 0.7,
    "writing": 0.7,
    "humanities": 0.1,
    "stem": 0.1,
}
"""Where many answers are good the likeliest words are seldom the best ones. Values as those of MT-bench (Zheng et al. 2023)."""


class Question(msgspec.Struct, frozen=True):
    """One question; each further turn is asked after the answer to the one before.

    `reference`: a right answer for each turn, for the judge's eyes only. `temperature`: what to sample the answers with, unless
    the user says otherwise. `checks`: rules that the answers meet or not. `criteria`: what a rubric grades its answers by.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None
    temperature: float | None = None
    checks: tuple[Check, ...] = ()
    criteria: str | None = None


def list_question_sets() -> list[str]:
    """Names of the shipped sets, sorted."""
    return sorted(entry.name[: -len(".jsonl")] for entry in _folder().iterdir() if entry.name.endswith(".jsonl"))


def load_questions(source: str = STARTER) -> list[Question]:
    """A shipped set by name, or the questions of a file: `PATH`, `FORM:PATH` or `FORM:PATH,REFERENCES`.

    Each line of a plain file is `{"question_id": …, "category": …, "turns": ["…"]}`; `"text": "…"` may stand for a single turn.
    A question without a temperature gets that of its category, 0 where `CATEGORY_TEMPERATURES` does not have it. Raises
    `UsageError` for a name that is nothing of these, `DataError` for a bad line.
    """
    if source in list_question_sets():
        return _build(read_question_file((_folder() / f"{source}.jsonl").read_bytes(), source), source)
    form, path, references = _split_source(source)
    if not path.suffix and not path.exists():
        raise UsageError(
            f"there is no question set {source!r}, and no such file.",
            remedy=did_you_mean(source, list_question_sets()),
        )
    with storage_errors(path):
        lines = read_question_file(path.read_bytes(), str(path), form)
    if references is not None:
        with storage_errors(references):
            known = read_references(references.read_bytes(), str(references))
        for line in lines:
            line.reference = known.pop(line.question_id, line.reference)
        if known:
            first = next(iter(known))
            raise DataError(
                f"{references} has answers to {len(known)} questions that {path} has not, question {first} the first.",
                remedy="give the two files that belong together",
            )
    return _build(lines, str(path))


def load_question_sets(sources: Iterable[str]) -> list[Question]:
    """The questions of several sets or files, one after the other. Raises `UsageError` where two share an id."""
    owners: dict[str, str] = {}
    questions = []
    for source in dict.fromkeys(sources):
        for question in load_questions(source):
            name = str(question.question_id)
            if name in owners:
                raise UsageError(
                    f"{source} and {owners[name]} both have a question {question.question_id}.",
                    remedy="ask them in runs of their own, each with its own --out",
                )
            owners[name] = source
            questions.append(question)
    return questions


def _split_source(source: str) -> tuple[str | None, Path, Path | None]:
    form, colon, rest = source.partition(":")
    # A path may hold a colon too; a word that is no form and no path is a form with a typing error.
    if not colon or "/" in form or (form not in FORMS and Path(source).exists()):
        return None, Path(source), None
    path, comma, references = rest.partition(",")
    return form, Path(path), Path(references) if comma else None


def _build(lines: list[QuestionLine], source: str) -> list[Question]:
    # By their text: 1 and "1" are one id where verdicts are put together.
    questions: dict[str, Question] = {}
    for line in lines:
        name = str(line.question_id)
        turns = line.turns or ((line.text,) if line.text is not None else ())
        stated = line.reference or None
        reference = (stated,) if isinstance(stated, str) else stated
        category, checks = line.category or _GENERIC, line.checks or ()
        if not turns or not all(turn.strip() for turn in turns):
            raise DataError(f"{line.where}: question {line.question_id} asks nothing.", remedy="give it turns")
        if name in questions:
            raise DataError(f"{line.where}: the id {line.question_id} is taken.", remedy="give each its own id")
        if reference is not None and len(reference) != len(turns):
            raise DataError(
                f"{line.where}: question {line.question_id} has {len(turns)} turns and {len(reference)} reference answers.",
                remedy="give an answer for each turn",
            )
        for check in checks:
            if not 0 <= check.turn < len(turns):
                raise DataError(
                    f"{line.where}: a check of question {line.question_id} is for turn {check.turn}.",
                    remedy=f"turns go from 0 to {len(turns) - 1}",
                )
        temperature = line.temperature if line.temperature is not None else CATEGORY_TEMPERATURES.get(category, 0.0)
        questions[name] = Question(line.question_id, category, turns, reference, temperature, checks, line.criteria)
    if not questions:
        raise DataError(f"{source} holds no question.", remedy="give at least one JSON line")
    return list(questions.values())


def _folder() -> Any:
    return resources.files("chaccu.judge") / "question_sets"
