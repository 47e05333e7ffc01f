"""`tally_pairs`, `tally_grades`, `total_scores`: what verdicts come to, as counts and as figures with intervals by question.

Invariants: comparisons = counted + unparsed + failed, and grades likewise; only what was counted is in a figure. A
comparison of which an order failed is failed, as one order alone favours a place. It ignores how the figures are shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import fmean
from typing import Any, Literal

import msgspec

from chaccu.errors import DataError
from chaccu.judge.asking import JudgingFailure
from chaccu.judge.checking import ALL_CATEGORIES, name_category
from chaccu.judge.intervals import Estimate, estimate_mean, estimate_ratio, estimate_share
from chaccu.judge.verdicts import Comparison, Verdict, compare_orders

ALL = ALL_CATEGORIES

Fate = Literal["counted", "unparsed", "failed"]


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison and what became of it. `share`: of `model_a`, 1, 0.5 or 0; None unless it was counted."""

    one: Comparison
    fate: Fate
    share: float | None


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """`model` against `other`, on all questions or on one category, by one judge or by all.

    `wins` + `ties` + `losses` = `counted`; `flips` are those of the ties in which the orders contradict one another, and
    `one_order` those of the counted that were shown in one order only. `win_rate`: a tie is half a win.
    """

    judge: str
    model: str
    other: str
    category: str
    counted: int
    unparsed: int
    failed: int
    wins: int
    ties: int
    losses: int
    flips: int
    one_order: int
    win: Estimate
    tie: Estimate
    loss: Estimate
    win_rate: Estimate

    @property
    def asked(self) -> int:
        return self.counted + self.unparsed + self.failed


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """Sums of scores over the `n` places (a question's turn) that both have, and the first as a share of the second.

    `share` is what the Vicuna report prints as a percentage of the reference.
    """

    judge: str
    model: str
    reference: str
    n: int
    total: float
    reference_total: float
    share: Estimate


class Grade(msgspec.Struct, frozen=True, kw_only=True):
    """Mean single grade of `model` by one judge. `turn`: None for all of them together."""

    judge: str
    model: str
    category: str
    turn: int | None
    unparsed: int
    failed: int
    mean: Estimate


def compare_all(verdicts: Sequence[Verdict], failures: Iterable[JudgingFailure]) -> list[Compared]:
    """Every comparison that was asked for, with its fate; those of which no order was answered come last."""
    lacking: dict[tuple[Hashable, ...], JudgingFailure] = {}
    for failure in failures:
        if len(failure.models) == 2:
            lacking.setdefault(_item(failure, failure.models), failure)
    found = []
    for one in compare_orders(verdicts):
        failed = lacking.pop(_item(one, (one.model_a, one.model_b)), None) is not None
        fate: Fate = "unparsed" if one.winner is None else "failed" if failed else "counted"
        share = {"model_a": 1.0, "tie": 0.5, "model_b": 0.0}[str(one.winner)] if fate == "counted" else None
        found.append(Compared(one=one, fate=fate, share=share))
    for failure in lacking.values():
        model_a, model_b = sorted(failure.models)
        one = Comparison(
            question_id=failure.question_id,
            category=failure.category,
            turn=failure.turn,
            judge=failure.judge,
            prompt=failure.prompt,
            model_a=model_a,
            model_b=model_b,
            winner=None,
            orders=0,
        )
        found.append(Compared(one=one, fate="failed", share=None))
    return found


def tally_pairs(
    compared: Iterable[Compared], *, baseline: str | None = None, level: float = 0.95, seed: int = 0
) -> list[Tally]:
    """One tally for each pair, judge and category, `ALL` first; with several judges, one of all of them too.

    The baseline is the `other` of its pairs; else the model that comes first by name is `model`. Raises `DataError` where one
    of several judges has a name that would be taken for all of them.
    """
    groups: dict[tuple[str, str, str], list[Compared]] = defaultdict(list)
    for one in compared:
        groups[one.one.model_a, one.one.model_b, one.one.judge].append(one)
    judges = {judge for _, _, judge in groups}
    if len(judges) > 1:
        if ALL in judges:
            raise DataError(f"a judge is named {ALL!r}, as all of them together are.", remedy="report its folder by itself")
        for (model_a, model_b, _), members in list(groups.items()):
            groups[model_a, model_b, ALL] += members
    tallies = []
    for (model_a, model_b, judge), members in sorted(
        groups.items(), key=lambda item: (item[0][:2], item[0][2] != ALL, item[0])
    ):
        sides = (model_b, model_a) if model_a == baseline else (model_a, model_b)
        for category, own in _by_category(members, lambda one: name_category(one.one.category)):
            tallies.append(_tally(own, judge, sides, category, level, seed))
    return tallies


def total_scores(verdicts: Iterable[Verdict], *, baseline: str | None = None, seed: int = 0) -> list[Total]:
    """Totals the Vicuna way: of pairs whose judge gives two scores (the mean of both orders), and of single grades.

    Grades are totalled against `baseline`, and not without one. A place that lacks one of its scores is in no total; one that
    has several grades, by different prompts, has their mean.
    """
    places: dict[tuple[str, str, str], dict[Hashable, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    single: dict[tuple[str, str], dict[Hashable, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in verdicts:
        if one.scores is None or len(one.scores) != len(one.models):
            continue
        place = (str(one.question_id), one.turn)
        if one.is_comparison:
            (model, score), (other, score_other) = sorted(zip(one.models, one.scores, strict=True))
            if model == baseline:
                model, other, score, score_other = other, model, score_other, score
            places[one.judge, model, other][place].append((score, score_other))
        elif len(one.models) == 1:
            single[one.judge, one.models[0]][place].append(one.scores[0])
    totals = [
        _total(judge, model, other, {place: _mean_pair(pairs) for place, pairs in found.items()}, seed)
        for (judge, model, other), found in sorted(places.items())
    ]
    for (judge, model), scores in sorted(single.items()):
        reference = single.get((judge, baseline or ""), {})
        if model != baseline and reference:
            both = {place: (fmean(own), fmean(reference[place])) for place, own in scores.items() if place in reference}
            totals.append(_total(judge, model, str(baseline), both, seed))
    return totals


def tally_grades(verdicts: Iterable[Verdict], failures: Iterable[JudgingFailure], *, seed: int = 0) -> list[Grade]:
    """Mean grades by judge and model: of all, by category, and by turn where there are several."""
    groups: dict[tuple[str, str], list[Verdict | JudgingFailure]] = defaultdict(list)
    everything: list[Verdict | JudgingFailure] = [*verdicts, *failures]
    for one in everything:
        if len(one.models) == 1:
            groups[one.judge, one.models[0]].append(one)
    grades = []
    for (judge, model), members in sorted(groups.items()):
        grades += [_grade(own, judge, model, category, None, seed) for category, own in _by_category(members, _category)]
        turns = sorted({one.turn for one in members if one.turn is not None})
        if len(turns) > 1:
            grades += [_grade([one for one in members if one.turn == turn], judge, model, ALL, turn, seed) for turn in turns]
    return grades


def _item(one: Any, models: tuple[str, ...]) -> tuple[Hashable, ...]:
    return (str(one.question_id), one.turn, one.judge, one.prompt, frozenset(models))


def _category(one: Verdict | JudgingFailure) -> str:
    return name_category(one.category)


def _by_category(members: list[Any], category: Callable[[Any], str]) -> list[tuple[str, list[Any]]]:
    """All of them, then each category by name if there are several."""
    names = sorted({category(one) for one in members})
    parts = [(name, [one for one in members if category(one) == name]) for name in names]
    return [(ALL, members), *(parts if len(names) > 1 else [])]


def _tally(own: list[Compared], judge: str, sides: tuple[str, str], category: str, level: float, seed: int) -> Tally:
    counted = [one for one in own if one.share is not None]
    shares = [one.share if one.one.model_a == sides[0] else 1 - one.share for one in counted if one.share is not None]
    questions = [one.one.question_id for one in counted]

    def part(wanted: float) -> Estimate:
        return estimate_share([float(share == wanted) for share in shares], questions, level=level, seed=seed)

    return Tally(
        judge=judge,
        model=sides[0],
        other=sides[1],
        category=category,
        counted=len(counted),
        unparsed=sum(one.fate == "unparsed" for one in own),
        failed=sum(one.fate == "failed" for one in own),
        wins=shares.count(1.0),
        ties=shares.count(0.5),
        losses=shares.count(0.0),
        flips=sum(one.one.is_flip for one in counted),
        one_order=sum(one.one.orders == 1 for one in counted),
        win=part(1.0),
        tie=part(0.5),
        loss=part(0.0),
        win_rate=estimate_share(shares, questions, level=level, seed=seed),
    )


def _mean_pair(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return fmean(one for one, _ in pairs), fmean(other for _, other in pairs)


def _total(judge: str, model: str, reference: str, scores: dict[Any, tuple[float, float]], seed: int) -> Total:
    ours, theirs = [one for one, _ in scores.values()], [other for _, other in scores.values()]
    return Total(
        judge=judge,
        model=model,
        reference=reference,
        n=len(scores),
        total=sum(ours),
        reference_total=sum(theirs),
        share=estimate_ratio(ours, theirs, [place[0] for place in scores], seed=seed),
    )


def _grade(own: list[Any], judge: str, model: str, category: str, turn: int | None, seed: int) -> Grade:
    read = [one for one in own if isinstance(one, Verdict)]
    return Grade(
        judge=judge,
        model=model,
        category=category,
        turn=turn,
        unparsed=sum(one.scores is None for one in read),
        failed=len(own) - len(read),
        mean=estimate_mean(
            [one.scores[0] if one.scores else None for one in read], [one.question_id for one in read], seed=seed
        ),
    )
