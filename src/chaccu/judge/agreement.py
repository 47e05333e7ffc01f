"""How far labels agree: plain agreement, Cohen's kappa, Krippendorff's alpha, and what the order of answers does to a judge.

Invariants: what is missing (None) is in no figure and is counted where a figure counts; a figure that the data do not
determine is None. It ignores who gave the labels and what they are of.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Literal

import msgspec

from chaccu.errors import DataError
from chaccu.judge.intervals import Estimate, estimate_share
from chaccu.judge.verdicts import Verdict, compare_orders

TIE = "tie"
Level = Literal["nominal", "ordinal", "interval"]
LabelPair = tuple[Hashable | None, Hashable | None]


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """`agree` of `total` pairs of labels are equal; `ratio` is None without any. `missing`: pairs that lack a label."""

    agree: int
    total: int
    ratio: float | None
    missing: int


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """What the place of an answer does, over single verdicts on pairs and over pairs shown in both orders.

    `first` + `second` + `tie` = verdicts read. The rates are of these. `consistent` of the `both_orders` pairs that were read
    say the same twice (two ties do); `consistency` is their share. Of the rest, `flips_to_first` and `flips_to_second` took
    the same place twice. `first_share` is of the decided verdicts on these pairs: 0.5 where the place means nothing. With one
    order alone it would say as much of the models.
    """

    first: int
    second: int
    tie: int
    unparsed: int
    first_rate: float | None
    second_rate: float | None
    tie_rate: float | None
    first_share: Estimate
    both_orders: int
    consistent: int
    flips_to_first: int
    flips_to_second: int
    consistency: Estimate


def count_agreement(pairs: Iterable[LabelPair], *, ties: bool = True) -> Agreement:
    """Agreement over pairs of labels. Without `ties`, a pair in which either is a tie is left out (Zheng et al. 2023)."""
    agree = total = missing = 0
    for one, other in pairs:
        if one is None or other is None:
            missing += 1
        elif ties or TIE not in (one, other):
            total += 1
            agree += one == other
    return Agreement(agree=agree, total=total, ratio=agree / total if total else None, missing=missing)


def pair_with(
    labels: Mapping[Hashable, Hashable | None], votes: Mapping[Hashable, Sequence[Hashable | None]]
) -> list[LabelPair]:
    """(label, vote) for each vote on an item that has a label, as MT-bench counts judge–human agreement."""
    return [(labels[item], vote) for item, given in votes.items() if item in labels for vote in given]


def pair_among(votes: Mapping[Hashable, Sequence[Hashable | None]]) -> list[LabelPair]:
    """Every two votes on the same item: the agreement over these is the ceiling for a judge that is held to the votes.

    Each vote is held to each other one and never to itself. Which of two votes comes first means nothing: `cohen_kappa` over
    these wants `mirror` first.
    """
    return [pair for given in votes.values() for pair in combinations(given, 2)]


def mirror(pairs: Iterable[LabelPair]) -> list[LabelPair]:
    """Each pair in both orders: kappa over these is Scott's pi (1955), the one for raters who are not told apart."""
    return [both for one, other in pairs for both in ((one, other), (other, one))]


def cohen_kappa(pairs: Iterable[LabelPair]) -> float | None:
    """Agreement beyond chance of two raters: (p_o − p_e) / (1 − p_e), p_e from each rater's own frequencies.

    Cohen 1960, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20. Pairs that lack a
    label are left out. None without pairs, or where both raters only ever gave one and the same label.
    """
    kept = [(one, other) for one, other in pairs if one is not None and other is not None]
    count = len(kept)
    if not count:
        return None
    ones, others = Counter(one for one, _ in kept), Counter(other for _, other in kept)
    # Whole numbers up to the end: equal figures are then equal to the last digit, whatever the order.
    observed = count * sum(one == other for one, other in kept)
    expected = sum(times * others[label] for label, times in ones.items())
    if expected == count * count:
        return None
    return (observed - expected) / (count * count - expected)


def krippendorff_alpha(units: Iterable[Sequence[Hashable | None]], level: Level = "nominal") -> float | None:
    """Agreement beyond chance of any number of raters: 1 − D_o / D_e, by the matrix of coincidences.

    `units`: for each item its ratings, None where a rater has none; an item with fewer than two counts for nothing. Ordinal and
    interval ratings are numbers. Krippendorff 2011, "Computing Krippendorff's alpha-reliability", sections D and E. None where
    nothing can be compared, or where all ratings are equal. Raises `DataError` for ratings that are not numbers.
    """
    coincidences: dict[tuple[Hashable, Hashable], float] = {}
    totals: Counter[Hashable] = Counter()
    for unit in units:
        given = Counter(value for value in unit if value is not None)
        size = given.total()
        if size < 2:
            continue
        totals.update(given)
        for one, times in given.items():
            for other, times_other in given.items():
                together = times * (times_other - (one == other)) / (size - 1)
                coincidences[one, other] = coincidences.get((one, other), 0.0) + together
    distance = _squared_distances(totals, level)
    observed = sum(together * distance[pair] for pair, together in coincidences.items())
    expected = sum(totals[one] * totals[other] * distance[one, other] for one in totals for other in totals)
    return 1 - (totals.total() - 1) * observed / expected if expected else None


def _squared_distances(totals: Counter[Hashable], level: Level) -> dict[tuple[Hashable, Hashable], float]:
    if level == "nominal":
        return {(one, other): float(one != other) for one in totals for other in totals}
    numbers = {value: float(value) for value in totals if isinstance(value, (int, float)) and math.isfinite(value)}
    if len(numbers) < len(totals):
        wrong = next(value for value in totals if value not in numbers)
        raise DataError(f"{wrong!r} is no number.", remedy=f"{level} ratings are numbers; take the level nominal for names")
    if level == "interval":
        return {(one, other): (numbers[one] - numbers[other]) ** 2 for one in numbers for other in numbers}
    below: dict[Hashable, float] = {}
    counted = 0
    for value in sorted(numbers, key=lambda value: numbers[value]):
        # The place of a value is the middle of those that share it, so a distance is half of both ends and all between.
        below[value] = counted + totals[value] / 2
        counted += totals[value]
    return {(one, other): (below[one] - below[other]) ** 2 for one in below for other in below}


def count_correct(labels: Sequence[Hashable | None], gold: Sequence[Hashable]) -> Agreement:
    """How many labels are the right ones; `total` has the missing ones too, as a judge that says nothing is not right."""
    agree = sum(label is not None and label == right for label, right in zip(labels, gold, strict=True))
    missing = sum(label is None for label in labels)
    return Agreement(agree=agree, total=len(gold), ratio=agree / len(gold) if gold else None, missing=missing)


def measure_position(verdicts: Sequence[Verdict], *, seed: int = 0) -> Position:
    """Position bias over the comparisons among `verdicts`; intervals by question."""
    pairs = [one for one in verdicts if one.is_comparison]
    said = Counter(one.outcome for one in pairs)
    read = len(pairs) - said[None]
    both = [one for one in compare_orders(pairs) if one.orders == 2 and one.winner is not None]
    balanced = {(one.question_id, one.turn, one.judge, one.prompt, frozenset((one.model_a, one.model_b))) for one in both}
    decided = [one for one in pairs if one.outcome in ("first", "second") and _item(one) in balanced]
    flips = _flips(pairs)
    return Position(
        first=said["first"],
        second=said["second"],
        tie=said["tie"],
        unparsed=said[None],
        first_rate=said["first"] / read if read else None,
        second_rate=said["second"] / read if read else None,
        tie_rate=said["tie"] / read if read else None,
        first_share=estimate_share(
            [float(one.outcome == "first") for one in decided], [one.question_id for one in decided], seed=seed
        ),
        both_orders=len(both),
        consistent=sum(one.is_consistent for one in both),
        flips_to_first=flips["first"],
        flips_to_second=flips["second"],
        consistency=estimate_share([float(one.is_consistent) for one in both], [one.question_id for one in both], seed=seed),
    )


def _item(one: Verdict) -> tuple[Hashable, ...]:
    """What both orders of a pair have in common."""
    return (one.question_id, one.turn, one.judge, one.prompt, frozenset(one.models))


def _flips(pairs: Sequence[Verdict]) -> Counter[str]:
    """How often each place won in both orders."""
    orders: dict[tuple[object, ...], dict[str, str | None]] = {}
    for one in pairs:
        orders.setdefault(_item(one), {})[one.models[0]] = one.outcome
    twice = [list(said.values()) for said in orders.values() if len(said) == 2]
    return Counter(one for one, other in twice if one == other and one is not None and one != TIE)
