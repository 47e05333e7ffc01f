"""`score_reviews`: a judge's raw texts into scores, grades and choices, totals by pair or model, and what could not be read;
`list_battles`: the same reviews as battles for a ranking.

Invariants: reviews = parsed + unparsed + those without a text, and each unparsed one is named; reviews = battles + grades +
unnamed; a result that is on file beside the text is compared with the text, never taken for it. Only where a file keeps no text
does its result count, told apart. It ignores how a text is read, which is the work of `judge/parsing.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from chaccu.judge.parsing import compare_scores, parse_choice, parse_grade, parse_mark, parse_scores, read_outcome, read_scores
from chaccu.judge.prompts import JudgePrompt, list_prompts, load_prompt
from chaccu.judge.reviews import Form, Review
from chaccu.judge.verdicts import Outcome

_Result = tuple[float, ...] | Outcome
_WINNERS: dict[Outcome, Literal["model_a", "model_b", "tie"]] = {"first": "model_a", "second": "model_b", "tie": "tie"}


class PairScores(msgspec.Struct, kw_only=True):
    """Sums over the reviews of one pair. `total`, `ratio_b_over_a`: over the `scored` reviews, which state two scores; the
    others state which answer is better and nothing more. The ratio is None when a has no total.
    """

    reviews: int = 0
    unparsed: int = 0
    scored: int = 0
    total: tuple[float, float] = (0.0, 0.0)
    a_win: int = 0
    tie: int = 0
    b_win: int = 0
    ratio_b_over_a: float | None = None
    by_category: dict[str, PairScores] = {}


class Grades(msgspec.Struct, kw_only=True):
    """Sums over the reviews of one model's answers. `average`: over the parsed ones, None when there is none."""

    reviews: int = 0
    unparsed: int = 0
    total: float = 0.0
    average: float | None = None
    by_turn: dict[str, Grades] = {}
    by_category: dict[str, Grades] = {}


class NamedReview(msgspec.Struct, frozen=True, kw_only=True):
    """Where a review is to be found. `pair`: of two models, or the one that was graded."""

    question_id: int | str
    pair: str
    review_id: str = ""
    turn: int | None = None


class Contradiction(NamedReview, frozen=True, kw_only=True):
    """The result on file is not that of the text: scores, one or two, or the place of the better answer."""

    stored: _Result
    text: _Result


class ScoreReport(msgspec.Struct, frozen=True, kw_only=True):
    """`reviews` = `parsed` + the number of `unparsed` + `without_text`. `unlike_first_line`: parsed reviews of two scores that
    do not begin with them. `pairs`: by pair of models; `models`: the graded ones.
    """

    reviews: int
    parsed: int
    unparsed: list[NamedReview]
    without_text: int
    contradictions: list[Contradiction]
    unlike_first_line: int
    pairs: dict[str, PairScores]
    models: dict[str, Grades]


class Battle(msgspec.Struct, frozen=True, kw_only=True):
    """A review of two answers as `chaccu rank` reads it, in the order shown. `winner`: None where nothing could be read."""

    question_id: str
    model_a: str
    model_b: str
    winner: Literal["model_a", "model_b", "tie"] | None
    category: str
    turn: int | None
    review_id: str


class BattleList(msgspec.Struct, frozen=True, kw_only=True):
    """Reviews are `battles` + `grades`, which are of one answer, + `unnamed`, which do not name two models."""

    battles: list[Battle]
    grades: int
    unnamed: int


class _Stated(msgspec.Struct, frozen=True):
    """What a text states; neither where it could not be read."""

    form: Form
    scores: tuple[float, ...] | None = None
    outcome: Outcome | None = None

    @property
    def is_nothing(self) -> bool:
        return self.scores is None and self.outcome is None


def score_reviews(reviews: Iterable[Review]) -> ScoreReport:
    """Read every review and add up, by pair or model and, where reviews name them, by category and turn.

    A review that names a shipped prompt is read as that prompt's verdicts are, neither more nor less strictly.
    """
    pairs: dict[str, PairScores] = {}
    models: dict[str, Grades] = {}
    unparsed: list[NamedReview] = []
    contradictions: list[Contradiction] = []
    parsed = without_text = elsewhere = 0
    for review, stated in _read_all(reviews):
        if stated.form == "grade":
            _add_grade(models.setdefault(review.pair_name, Grades(by_turn={}, by_category={})), review, stated)
        else:
            _add_pair(pairs.setdefault(review.pair_name, PairScores(by_category={})), review, stated)
        if stated.is_nothing:
            unparsed.append(NamedReview(**_place(review)))
        elif review.text is None:
            without_text += 1
        else:
            parsed += 1
            if stated.form == "scores":
                elsewhere += parse_scores(review.text.lstrip().partition("\n")[0]) is None
            if (differing := _contradiction(review, stated)) is not None:
                contradictions.append(Contradiction(**_place(review), stored=differing[0], text=differing[1]))
    return ScoreReport(
        reviews=parsed + len(unparsed) + without_text,
        parsed=parsed,
        unparsed=unparsed,
        without_text=without_text,
        contradictions=contradictions,
        unlike_first_line=elsewhere,
        pairs=pairs,
        models=models,
    )


def list_battles(reviews: Iterable[Review]) -> BattleList:
    """A battle of each review of two named models, read as `score_reviews` reads it; both orders of a pair are two battles."""
    battles: list[Battle] = []
    grades = unnamed = 0
    for review, stated in _read_all(reviews):
        if stated.form == "grade":
            grades += 1
        elif review.both_models is None:
            unnamed += 1
        else:
            model_a, model_b = review.both_models
            outcome = _outcome(stated)
            battles.append(
                Battle(
                    question_id=str(review.question_id),
                    model_a=model_a,
                    model_b=model_b,
                    winner=None if outcome is None else _WINNERS[outcome],
                    category=review.category,
                    turn=review.turn,
                    review_id=review.review_id,
                )
            )
    return BattleList(battles=battles, grades=grades, unnamed=unnamed)


def _place(review: Review) -> dict[str, Any]:
    return {name: getattr(review, name) for name in ("question_id", "review_id", "turn")} | {"pair": review.pair_name}


def _read_all(reviews: Iterable[Review]) -> list[tuple[Review, _Stated]]:
    reviews = list(reviews)
    shipped = {name: load_prompt(name) for name in {one.prompt for one in reviews} & set(list_prompts())}
    return [(review, _read(review, shipped.get(review.prompt))) for review in reviews]


def _read(review: Review, prompt: JudgePrompt | None) -> _Stated:
    text = review.text
    if text is None:
        return _Stated("choice", outcome=review.outcome)
    if prompt is not None:
        form: Form = "grade" if prompt.kind == "single" else "scores" if prompt.output == "score_pair" else "choice"
        scores = read_scores(text, prompt, review.finish_reason)
        return _Stated(form, scores=scores, outcome=None if scores else read_outcome(text, prompt, review.finish_reason))
    if review.form == "grade":
        return _grade(text)
    if review.form == "scores":
        return _Stated("scores", scores=parse_scores(text))
    if review.form == "choice" or parse_mark(text) is not None:
        return _Stated("choice", outcome=parse_choice(text))
    if (scores := parse_scores(text)) is not None:
        return _Stated("scores", scores=scores)
    is_pair = bool(review.pair or review.model_a or review.model_b)
    return _Stated("choice", outcome=parse_choice(text)) if is_pair or parse_grade(text) is None else _grade(text)


def _grade(text: str) -> _Stated:
    grade = parse_grade(text)
    return _Stated("grade", scores=None if grade is None else (grade,))


def _contradiction(review: Review, stated: _Stated) -> tuple[_Result, _Result] | None:
    """The result on file and that of the text, where they differ; of scores and an outcome the outcomes are compared."""
    if review.score is not None and stated.scores is not None:
        return None if review.score == stated.scores else (review.score, stated.scores)
    outcome = _outcome(stated)
    if review.outcome is None or outcome is None or review.outcome == outcome:
        return None
    return review.outcome, outcome


def _outcome(stated: _Stated) -> Outcome | None:
    return compare_scores(stated.scores) if stated.form == "scores" and stated.scores else stated.outcome


def _add_pair(sums: PairScores, review: Review, stated: _Stated) -> None:
    parts = [sums]
    if review.category:
        parts.append(sums.by_category.setdefault(review.category, PairScores()))
    outcome = _outcome(stated)
    for part in parts:
        part.reviews += 1
        part.unparsed += outcome is None
        part.a_win += outcome == "first"
        part.tie += outcome == "tie"
        part.b_win += outcome == "second"
        if stated.scores:
            a, b = stated.scores
            part.scored += 1
            part.total = (part.total[0] + a, part.total[1] + b)
            part.ratio_b_over_a = part.total[1] / part.total[0] if part.total[0] else None


def _add_grade(sums: Grades, review: Review, stated: _Stated) -> None:
    parts = [sums]
    if review.turn is not None:
        parts.append(sums.by_turn.setdefault(str(review.turn), Grades()))
    if review.category:
        parts.append(sums.by_category.setdefault(review.category, Grades()))
    for part in parts:
        part.reviews += 1
        if stated.scores is None:
            part.unparsed += 1
        else:
            part.total += stated.scores[0]
            part.average = part.total / (part.reviews - part.unparsed)
