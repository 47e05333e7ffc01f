"""`Question` and the sets of them: shipped ones by name, others out of files.

Invariants: the ids of a set are unique, and every question has at least one turn with text; a file that breaks this is
refused with its line. It ignores fields that it does not know.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import DataError, UsageError, did_you_mean
from chaccu.judge.checks import Check

STARTER = "starter"


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


class _Line(msgspec.Struct):
    """A line of a question file: `turns`, or `text` for a single one."""

    question_id: int | str
    category: str = "generic"
    turns: tuple[str, ...] = ()
    text: str | None = None
    criteria: str | None = None


def list_question_sets() -> list[str]:
    """Names of the shipped sets, sorted."""
    return sorted(entry.name[: -len(".jsonl")] for entry in _folder().iterdir() if entry.name.endswith(".jsonl"))


def load_questions(name_or_path: str = STARTER) -> list[Question]:
    """A shipped set by name, or the questions of a JSONL file.

    Each line is `{"question_id": …, "category": …, "turns": ["…"]}`; `"text": "…"` may stand for a single turn. Raises
    `UsageError` for a name that is neither, `DataError` for a bad line.
    """
    if name_or_path in list_question_sets():
        return _parse((_folder() / f"{name_or_path}.jsonl").read_bytes(), name_or_path)
    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        raise UsageError(
            f"there is no question set {name_or_path!r}, and no such file.",
            remedy=did_you_mean(name_or_path, list_question_sets()),
        )
    with storage_errors(path):
        data = path.read_bytes()
    return _parse(data, str(path))


def _parse(data: bytes, source: str) -> list[Question]:
    decoder = msgspec.json.Decoder(_Line)
    questions: dict[int | str, Question] = {}
    for number, text in enumerate(data.splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise DataError(
                f"line {number} of {source} is no question: {error}.",
                remedy='give {"question_id": 1, "category": "knowledge", "turns": ["…"]}',
            ) from error
        turns = line.turns or ((line.text,) if line.text is not None else ())
        if not turns or not all(turn.strip() for turn in turns):
            raise DataError(f"line {number} of {source}: question {line.question_id} asks nothing.", remedy="give it turns")
        if line.question_id in questions:
            raise DataError(f"line {number} of {source}: the id {line.question_id} is taken.", remedy="give each its own id")
        questions[line.question_id] = Question(line.question_id, line.category, turns, criteria=line.criteria)
    if not questions:
        raise DataError(f"{source} holds no question.", remedy="give at least one JSON line")
    return list(questions.values())


def _folder() -> Any:
    return resources.files("chaccu.judge") / "question_sets"
