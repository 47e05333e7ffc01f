"""`score_reviews`: a judge's raw texts into pairs of scores, totals by pair of models, and what could not be read.

Invariants: reviews = parsed + unparsed, and each unparsed one is named; a score that is on file beside the text is
compared with the text, never taken for it. A pair of scores counts only where the judge states it: alone in a
line ("8 7", "8.5, 7", "(8, 7)"), as two labelled lines ("Assistant 1: 8", "Assistant 2: 7"), or in a sentence that speaks of
scores; other numbers in brackets, such as the points of a geometry task, do not. Of several statements the last holds, as
a judge may work towards its verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import DataError
from chaccu.judge.parsing import parse_scores


class Review(msgspec.Struct, frozen=True, kw_only=True):
    """A judge's text about two answers. `score`: its scores as they are on file, if they are; `review_id`: its own name."""

    question_id: int | str
    text: str
    review_id: str = ""
    pair: str = ""
    model_a: str = ""
    model_b: str = ""
    category: str = ""
    score: tuple[float, float] | None = None

    @property
    def pair_name(self) -> str:
        """The pair of models, by its own name or by theirs; "all" when the line names neither."""
        return self.pair or (f"{self.model_a}__{self.model_b}" if self.model_a or self.model_b else "all")


class PairScores(msgspec.Struct, kw_only=True):
    """Sums over the parsed reviews of one pair. `ratio_b_over_a`: total of b over total of a, None when a has none."""

    reviews: int = 0
    unparsed: int = 0
    total: tuple[float, float] = (0.0, 0.0)
    a_win: int = 0
    tie: int = 0
    b_win: int = 0
    ratio_b_over_a: float | None = None
    by_category: dict[str, PairScores] = {}


class NamedReview(msgspec.Struct, frozen=True, kw_only=True):
    """Where a review is to be found."""

    question_id: int | str
    pair: str
    review_id: str = ""


class Contradiction(NamedReview, frozen=True, kw_only=True):
    """The scores on file are not those of the text."""

    stored: tuple[float, float]
    text: tuple[float, float]


class ScoreReport(msgspec.Struct, frozen=True, kw_only=True):
    """`reviews` = `parsed` + the number of `unparsed`. `unlike_first_line`: parsed reviews that do not
    begin with their scores.
    """

    reviews: int
    parsed: int
    unparsed: list[NamedReview]
    contradictions: list[Contradiction]
    unlike_first_line: int
    pairs: dict[str, PairScores]


def read_reviews(file: Path) -> list[Review]:
    """Reviews out of JSONL: `{"question_id": …, "text": …}` and, if known, pair, models, category, score and review_id.

    Raises `StorageError` for an unreadable file, `DataError` naming a bad line.
    """
    with storage_errors(file):
        lines = file.read_bytes().splitlines()
    decoder = msgspec.json.Decoder(Review)
    reviews = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            reviews.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise DataError(
                f"line {number} of {file} is no review: {error}.", remedy='give {"question_id": 1, "text": "8 7 …"}'
            ) from error
    if not reviews:
        raise DataError(f"{file} holds no review.", remedy="give at least one JSON line")
    return reviews


def score_reviews(reviews: Iterable[Review]) -> ScoreReport:
    """Parse every review and add up, by pair and, where reviews name one, by category."""
    pairs: dict[str, PairScores] = {}
    unparsed: list[NamedReview] = []
    contradictions: list[Contradiction] = []
    parsed = elsewhere = 0
    for review in reviews:
        scores = parse_scores(review.text)
        whole = pairs.setdefault(review.pair_name, PairScores(by_category={}))
        _add(whole, scores)
        if review.category:
            _add(whole.by_category.setdefault(review.category, PairScores()), scores)
        if scores is None:
            unparsed.append(NamedReview(question_id=review.question_id, pair=review.pair_name, review_id=review.review_id))
            continue
        parsed += 1
        elsewhere += parse_scores(review.text.lstrip().partition("\n")[0]) is None
        if review.score is not None and review.score != scores:
            contradictions.append(
                Contradiction(
                    question_id=review.question_id,
                    pair=review.pair_name,
                    review_id=review.review_id,
                    stored=review.score,
                    text=scores,
                )
            )
    return ScoreReport(
        reviews=parsed + len(unparsed),
        parsed=parsed,
        unparsed=unparsed,
        contradictions=contradictions,
        unlike_first_line=elsewhere,
        pairs=pairs,
    )


def _add(sums: PairScores, scores: tuple[float, float] | None) -> None:
    sums.reviews += 1
    if scores is None:
        sums.unparsed += 1
        return
    a, b = scores
    sums.total = (sums.total[0] + a, sums.total[1] + b)
    sums.a_win += a > b
    sums.tie += a == b
    sums.b_win += a < b
    sums.ratio_b_over_a = sums.total[1] / sums.total[0] if sums.total[0] else None
