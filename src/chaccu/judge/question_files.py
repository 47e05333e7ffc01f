"""Files of questions in the forms that are about, each read into `QuestionLine`s.

Invariants: nothing is guessed beyond the form, which the user names or the content tells; what a form does not say, or says
with null, stays empty. A line that cannot be read is refused with its number. It ignores fields that are of no use to a
question, among them the baseline answers of AlpacaEval: another model's answer is no right answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from chaccu.errors import DataError, UsageError, did_you_mean
from chaccu.judge.checks import Check

PLAIN = "plain"

_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError)


class QuestionLine(msgspec.Struct, kw_only=True):
    """One question as a file has it: `turns`, or `text` for a single one; `where` it stands, for messages."""

    question_id: int | str
    category: str | None = None
    turns: tuple[str, ...] | None = None
    text: str | None = None
    reference: tuple[str, ...] | str | None = None
    temperature: float | None = None
    checks: tuple[Check, ...] | None = None
    criteria: str | None = None
    where: str = ""


class _ReferenceChoice(msgspec.Struct):
    turns: tuple[str, ...]


class _ReferenceLine(msgspec.Struct):
    question_id: int | str
    choices: tuple[_ReferenceChoice, ...]


class _Instruction(msgspec.Struct):
    instruction: str
    input: str | None = None
    dataset: str | None = None


class _ArenaTurn(msgspec.Struct):
    content: str


class _ArenaLine(msgspec.Struct):
    uid: int | str | None = None
    question_id: int | str | None = None
    cluster: str | None = None
    category: str | None = None
    prompt: str | None = None
    turns: tuple[_ArenaTurn | str, ...] | None = None


def read_question_file(data: bytes, source: str, form: str | None = None) -> list[QuestionLine]:
    """The questions of a file; `form` is one of `FORMS`, or None to tell it by the content.

    Raises `UsageError` for an unknown form, `DataError` for a line that is none of the form.
    """
    if form is not None and form not in FORMS:
        raise UsageError(f"{form!r} is no form of question files.", remedy=did_you_mean(form, FORMS))
    data = data.removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        raise DataError(f"{source} holds no question.", remedy="give at least one JSON line")
    return list(FORMS[form or _tell_form(data)](data, source))


def read_references(data: bytes, source: str) -> dict[int | str, tuple[str, ...]]:
    """Reference answers by question id, from lines such as `{"question_id": 101, "choices": [{"turns": ["…"]}]}` (MT-bench)."""
    references: dict[int | str, tuple[str, ...]] = {}
    for where, line in _decode_lines(data.removeprefix(codecs.BOM_UTF8), source, _ReferenceLine, "reference answer"):
        if line.question_id in references:
            raise DataError(f"{where} is a second answer to question {line.question_id}.", remedy="keep the right one")
        if len(line.choices) != 1:
            raise DataError(f"{where} has {len(line.choices)} choices, not one.", remedy="keep the right one")
        references[line.question_id] = line.choices[0].turns
    return references


def _tell_form(data: bytes) -> str:
    text = data.lstrip()
    if text.startswith(b"["):
        return "alpaca-eval"
    try:
        first = msgspec.json.decode(text.split(b"\n", 1)[0])
    except _NOT_JSON:
        return PLAIN
    if not isinstance(first, dict):
        return PLAIN
    turns = first.get("turns")
    nested = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict)
    return "arena-hard" if nested or "uid" in first else PLAIN


def _read_plain(data: bytes, source: str) -> Iterator[QuestionLine]:
    for where, line in _decode_lines(data, source, QuestionLine, "question"):
        line.where = where
        yield line


def _read_alpaca_eval(data: bytes, source: str) -> Iterator[QuestionLine]:
    try:
        entries = msgspec.json.decode(data, type=list[_Instruction])
    except _NOT_JSON as error:
        raise DataError(
            f"{source} is no file of AlpacaEval: {error}.", remedy='give [{"instruction": "…", "dataset": "…"}, …]'
        ) from error
    for number, entry in enumerate(entries, start=1):
        yield QuestionLine(
            question_id=f"alpaca-eval-{number}",
            category=entry.dataset or "alpaca-eval",
            # AlpacaFarm's files keep what an instruction is about apart from it; AlpacaEval's have it in the instruction.
            turns=("\n\n".join(filter(None, (entry.instruction, entry.input))),),
            where=f"entry {number} of {source}",
        )


def _read_arena_hard(data: bytes, source: str) -> Iterator[QuestionLine]:
    for where, line in _decode_lines(data, source, _ArenaLine, "question of Arena-Hard"):
        question_id = line.uid if line.uid is not None else line.question_id
        if question_id is None:
            raise DataError(f"{where} has neither a uid nor a question_id.", remedy="give it one")
        turns = tuple(turn if isinstance(turn, str) else turn.content for turn in line.turns or ())
        category = line.cluster or line.category or "arena-hard"
        yield QuestionLine(question_id=question_id, category=category, turns=turns or (line.prompt or "",), where=where)


def _decode_lines(data: bytes, source: str, kind: Any, what: str) -> Iterator[tuple[str, Any]]:
    decoder = msgspec.json.Decoder(kind)
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        where = f"line {number} of {source}"
        try:
            yield where, decoder.decode(text)
        except _NOT_JSON as error:
            remedy = 'give {"question_id": 1, "category": "knowledge", "turns": ["…"]}' if kind is QuestionLine else ""
            raise DataError(f"{where} is no {what}: {error}.", remedy=remedy) from error


FORMS: dict[str, Callable[[bytes, str], Iterator[QuestionLine]]] = {
    PLAIN: _read_plain,
    # Both benches have lines of the plain form; their right answers are in a file of their own.
    "mt-bench": _read_plain,
    "vicuna-bench": _read_plain,
    "alpaca-eval": _read_alpaca_eval,
    "arena-hard": _read_arena_hard,
}
