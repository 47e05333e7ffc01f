"""`Vote`: what a person, or any other judge, said of two answers; and the files that hold such votes.

Invariants: a vote without a readable winner is missing, and stays in the list; the order of the models does not matter to the
`item` and `label` of a vote. It ignores who is right.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import DataError

Winner = Literal["model_a", "model_b", "tie"]
Item = tuple[str, int | None, str, str]

_WINNERS: Mapping[str, Winner] = MappingProxyType(
    {
        **dict.fromkeys(("model_a", "a", "left"), "model_a"),
        **dict.fromkeys(("model_b", "b", "right"), "model_b"),
        **dict.fromkeys(("tie", "tie (inconsistent)", "tie (bothbad)", "both_bad"), "tie"),
    }
)
_MISSING = ("", "error", "none", "null")


class Vote(msgspec.Struct, frozen=True, kw_only=True):
    """One vote on a pair. `turn`: as the file has it, None for the whole conversation; `winner`: None where there is none."""

    question_id: int | str
    turn: int | None = None
    model_a: str
    model_b: str
    winner: Winner | None
    judge: str = ""
    category: str = ""

    @property
    def item(self) -> Item:
        """What was voted on: the same for every vote on these two models at this question and turn."""
        first, second = sorted((self.model_a, self.model_b))
        return (str(self.question_id), self.turn, first, second)

    @property
    def label(self) -> Winner | None:
        """The winner in terms of `item`: `model_a` is the one that comes first by name."""
        if self.winner in (None, "tie") or self.model_a < self.model_b:
            return self.winner
        return "model_b" if self.winner == "model_a" else "model_a"


class _Line(msgspec.Struct):
    question_id: int | str
    model_a: str
    model_b: str
    winner: str | None
    turn: int | None = None
    judge: str = ""
    category: str = ""


def read_votes(file: Path, *, judges: str = "*", first_turn: int = 0) -> list[Vote]:
    """The votes of a CSV file, or of a JSONL one if its name does not end in `.csv`.

    Each has `question_id`, `model_a`, `model_b`, `winner` (`model_a`, `model_b`, `tie`, or a model's name) and, if known,
    `turn`, `judge`, `category`. `judges`: only whose name this pattern matches (`expert_*`). `first_turn`: the number that the
    file gives to the first turn, which is 0 here. Raises `StorageError`, `DataError`.
    """
    with storage_errors(file):
        data = file.read_bytes()
    rows = _csv_rows(data, file) if file.suffix == ".csv" else _json_rows(data.removeprefix(codecs.BOM_UTF8))
    votes = []
    for number, row in rows:
        try:
            line = msgspec.convert(row, _Line, strict=False) if file.suffix == ".csv" else msgspec.json.decode(row, type=_Line)
        except msgspec.DecodeError as error:
            raise DataError(
                f"line {number} of {file} is no vote: {error}.",
                remedy="it needs question_id, model_a, model_b and winner (model_a | model_b | tie)",
            ) from error
        if fnmatchcase(line.judge, judges):
            votes.append(_vote(line, f"line {number} of {file}", first_turn))
    if not votes:
        raise DataError(f"{file} holds no vote of a judge {judges!r}.", remedy="give at least one, or another pattern")
    return votes


def group_votes(votes: Iterable[Vote]) -> dict[Item, list[Winner | None]]:
    """The labels of each item, in the order of the file; of a judge with a name that voted twice on one, the last counts."""
    given: dict[Item, dict[object, Winner | None]] = {}
    for number, vote in enumerate(votes):
        given.setdefault(vote.item, {})[vote.judge or number] = vote.label
    return {item: list(labels.values()) for item, labels in given.items()}


def _json_rows(data: bytes) -> list[tuple[int, Any]]:
    return [(number, line) for number, line in enumerate(data.splitlines(), start=1) if line.strip()]


def _csv_rows(data: bytes, file: Path) -> list[tuple[int, Any]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error}.", remedy="save it as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    # An empty field is one that is not there, but for the winner.
    return [
        (reader.line_num, {name: value for name, value in row.items() if name and (value or name == "winner")})
        for row in reader
    ]


def _vote(line: _Line, source: str, first_turn: int) -> Vote:
    if line.model_a == line.model_b:
        raise DataError(f"{source} sets {line.model_a} against itself.", remedy="name two models")
    turn = None if line.turn is None else line.turn - first_turn
    if turn is not None and turn < 0:
        raise DataError(f"{source} has the turn {line.turn}; the first is {first_turn}.", remedy="name the first turn's number")
    return Vote(
        question_id=line.question_id,
        turn=turn,
        model_a=line.model_a,
        model_b=line.model_b,
        winner=_winner(line, source),
        judge=line.judge,
        category=line.category,
    )


def _winner(line: _Line, source: str) -> Winner | None:
    said = (line.winner or "").strip()
    if said == line.model_a:
        return "model_a"
    if said == line.model_b:
        return "model_b"
    if said.lower() in _MISSING:
        return None
    if said.lower() not in _WINNERS:
        raise DataError(
            f"{source} has the winner {said!r}.",
            remedy="model_a, model_b, tie, one of the two names, or null where there is none",
        )
    return _WINNERS[said.lower()]
