"""`Review`: a judge's raw text as it lies in a file, whoever wrote that file, and what is on file beside it.

Invariants: a line of two judgments (both orders of a pair) becomes two reviews, each in the order in which the answers were
shown; what a line stores as its result is kept apart from the text. It ignores what the text states.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import DataError
from chaccu.judge.verdicts import Outcome

Form = Literal["scores", "grade", "choice"]


class Review(msgspec.Struct, frozen=True, kw_only=True):
    """A judge's text about two answers, or about one of `model`.

    `text` is None where a file keeps no more than the result. `score`, `outcome`: the result on file, if there is one;
    `review_id`: the review's own name. `turn`: as the file counts turns. `prompt`: the name of the judge's prompt, if the file
    says it. `form`: what the text is to state, "" where only the text can tell. `finish_reason`: why the text ends, if known.
    """

    question_id: int | str
    text: str | None
    review_id: str = ""
    pair: str = ""
    model_a: str = ""
    model_b: str = ""
    model: str = ""
    category: str = ""
    turn: int | None = None
    prompt: str = ""
    score: tuple[float, ...] | None = None
    outcome: Outcome | None = None
    form: Form | Literal[""] = ""
    finish_reason: str = ""

    @property
    def pair_name(self) -> str:
        """The pair of models, or the one model, by its own name or by theirs; "all" when the line names none."""
        return self.pair or (f"{self.model_a}__{self.model_b}" if self.model_a or self.model_b else self.model or "all")

    @property
    def both_models(self) -> tuple[str, str] | None:
        """Two models in the order shown, by their own names or by a pair's `a__b`; None where the line does not name two."""
        named = (self.model_a, self.model_b) if self.model_a and self.model_b else tuple(self.pair.split("__"))
        return (named[0], named[1]) if len(named) == 2 and all(named) and named[0] != named[1] else None


class _Line(msgspec.Struct, kw_only=True):
    """A line of a file of judgments, by any of the names that such files use; see docs/judge.md."""

    question_id: int | str | None = None
    index: int | str | None = None
    text: str | None = None
    judgment: str | None = None
    review_id: int | str | None = None
    prompt: Any = None
    finish_reason: str | None = None
    pair: str | tuple[str, str] | None = None
    models: tuple[str, ...] = ()
    model_a: str | None = None
    model_b: str | None = None
    model_1: str | None = None
    model_2: str | None = None
    first: str | None = None
    second: str | None = None
    model: str | None = None
    model_id: str | None = None
    category: str | None = None
    strategy: str | None = None
    turn: int | None = None
    score: float | tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    verdict: int | str | None = None
    outcome: Outcome | None = None
    winner: int | str | None = None
    g1_judgment: str | None = None
    g2_judgment: str | None = None
    g1_winner: str | None = None
    g2_winner: str | None = None
    completion_original: str | None = None
    completion_swapped: str | None = None
    winner_original: int | str | None = None
    winner_swapped: int | str | None = None


_OUTCOMES: dict[str, Outcome] = {
    **dict.fromkeys(("1", "a", "first", "model_a", "model_1"), "first"),
    **dict.fromkeys(("2", "b", "second", "model_b", "model_2"), "second"),
    **dict.fromkeys(("3", "c", "tie"), "tie"),
}
_SWAPPED: dict[Outcome, Outcome] = {"first": "second", "second": "first", "tie": "tie"}


def read_reviews(file: Path) -> list[Review]:
    """Reviews out of JSONL, or JSONL in gzip in a file named `.gz`; docs/judge.md has the names of the fields.

    Raises `StorageError` for an unreadable file, `DataError` naming a bad line.
    """
    decoder = msgspec.json.Decoder(_Line)
    reviews: list[Review] = []
    for number, line in enumerate(_read(file).removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            reviews += _reviews_of(decoder.decode(line))
        except (msgspec.DecodeError, ValueError) as error:
            raise DataError(
                f"line {number} of {file} is no review: {error}.", remedy='give {"question_id": 1, "text": "8 7 …"}'
            ) from error
    if not reviews:
        raise DataError(f"{file} holds no review.", remedy="give at least one JSON line")
    return reviews


def _read(file: Path) -> bytes:
    with storage_errors(file):
        data = file.read_bytes()
    if file.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is no whole gzip file: {error}.", remedy="unpack it, or fetch it again") from error


def _reviews_of(line: _Line) -> Iterator[Review]:
    """The reviews of a line. Raises `ValueError` where it says too little."""
    question_id = line.question_id if line.question_id is not None else line.index
    if question_id is None:
        raise ValueError("it has no question_id")
    category = line.category or line.strategy or ""
    review = Review(
        question_id=question_id,
        text=None,
        review_id=str(line.review_id if line.review_id is not None else line.strategy or ""),
        turn=line.turn,
        category=category,
        prompt=line.prompt if isinstance(line.prompt, str) else "",
        finish_reason=line.finish_reason or "",
    )
    if line.g1_judgment is not None or line.g2_judgment is not None:
        models = line.model_1 or "model_1", line.model_2 or "model_2"
        yield _in_order(review, models, line.g1_judgment, line.g1_winner)
        yield _swapped(review, models, line.g2_judgment, line.g2_winner)
    elif line.winner_original is not None or line.completion_original is not None:
        yield _in_order(review, ("output_1", "output_2"), line.completion_original, line.winner_original)
        yield _swapped(review, ("output_1", "output_2"), line.completion_swapped, line.winner_swapped)
    else:
        yield _one_review(review, line)


def _in_order(review: Review, models: tuple[str, str], text: str | None, winner: int | str | None) -> Review:
    outcome = _outcome(winner)
    return msgspec.structs.replace(review, text=text, model_a=models[0], model_b=models[1], outcome=outcome, form="choice")


def _swapped(review: Review, models: tuple[str, str], text: str | None, winner: int | str | None) -> Review:
    """The second judgment of a line: the answers were shown the other way, and its winner is stored by the first order."""
    outcome = _outcome(winner)
    return msgspec.structs.replace(
        review,
        text=text,
        model_a=models[1],
        model_b=models[0],
        outcome=_SWAPPED[outcome] if outcome else None,
        form="choice",
    )


def _one_review(review: Review, line: _Line) -> Review:
    model_a = line.model_a or line.first or line.model_1 or (line.models[0] if len(line.models) == 2 else "")
    model_b = line.model_b or line.second or line.model_2 or (line.models[1] if len(line.models) == 2 else "")
    model = line.model or line.model_id or (line.models[0] if len(line.models) == 1 else "")
    score = line.scores if line.scores is not None else line.score
    stored = (score,) if isinstance(score, float) else score
    outcome = line.outcome or _outcome(line.verdict) or _outcome(line.winner, model_a, model_b)
    text = line.text if line.text is not None else line.judgment
    if text is None and outcome is None:
        raise ValueError("it has neither a text nor a winner")
    if stored is not None and len(stored) not in (1, 2):
        raise ValueError(f"its score has {len(stored)} numbers, where one or two are known")
    is_single = bool(model) and not (model_a or model_b or line.pair)
    if stored is not None:
        form: Form | Literal[""] = "grade" if len(stored) == 1 else "scores"
    elif is_single:
        form = "grade"
    else:
        form = "choice" if (line.verdict, line.winner, line.outcome) != (None, None, None) else ""
    return msgspec.structs.replace(
        review,
        text=text,
        pair="__".join(line.pair) if isinstance(line.pair, tuple) else line.pair or "",
        model_a=model_a,
        model_b=model_b,
        model=model if is_single else "",
        score=stored,
        outcome=outcome,
        form=form,
    )


def _outcome(result: int | str | None, model_a: str = "", model_b: str = "") -> Outcome | None:
    """A stored result by the place of the answer that won; None for none, an error, or a code such as -1."""
    if result is None:
        return None
    if isinstance(result, str) and result and result in (model_a, model_b):
        return "first" if result == model_a else "second"
    name = str(result).strip().lower()
    return "tie" if name.startswith("tie") else _OUTCOMES.get(name)
