"""`calibrate`: how far a judge agrees with people on the same items, and how far the people agree with one another.

Invariants: votes = compared + unread + without a verdict + without a winner + repeated; every figure comes with its n. A judge
is compared with each vote, as MT-bench does (Zheng et al. 2023, section 4), so an item with three votes counts three times, and
the intervals are by question. It ignores what the answers were.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

import msgspec

from chaccu.errors import DataError
from chaccu.judge.agreement import TIE, LabelPair, cohen_kappa, count_agreement, krippendorff_alpha, mirror, pair_among
from chaccu.judge.asking import JudgingFailure
from chaccu.judge.intervals import Estimate, estimate_share
from chaccu.judge.tallies import compare_all
from chaccu.judge.verdicts import Verdict
from chaccu.judge.votes import Item, Vote, Winner, group_votes

MARGIN = 0.05


class Agreed(msgspec.Struct, frozen=True, kw_only=True):
    """`agree` of `total`; `rate` has the interval by question. `kappa`: Cohen's, None where it is not determined; of people
    among themselves, who are not told apart, Scott's pi."""

    agree: int
    total: int
    rate: Estimate
    kappa: float | None


class BothWays(msgspec.Struct, frozen=True, kw_only=True):
    """Over all pairs of labels, and over those in which neither is a tie."""

    with_ties: Agreed
    no_ties: Agreed


class Contradiction(msgspec.Struct, frozen=True, kw_only=True):
    """An item on which the judge says otherwise than most of its votes. `is_opposite`: each has another winner."""

    question_id: str
    turn: int | None
    model_a: str
    model_b: str
    judge_says: str
    votes: dict[str, int]
    is_opposite: bool


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """One judge against the votes.

    `unread`: votes on what the judge's text does not tell; `no_winner`: votes that name none; `repeated`: earlier votes of
    somebody who voted again. `items`: pairs at a question and turn that have both. `human`: the people among themselves on
    these items, None where no item has two votes; `human_alpha`: Krippendorff's, nominal. `confusion`: what the judge says →
    what votes say → how many.
    `more_votes`: how many more votes like these bring the interval of agreement with ties to ± 5 points.
    """

    judge: str
    votes: int
    items: int
    compared: int
    unread: int
    no_winner: int
    repeated: int
    without_verdict: int
    agreement: BothWays
    human: BothWays | None
    human_alpha: float | None
    by_category: dict[str, BothWays]
    confusion: dict[str, dict[str, int]]
    contradictions: list[Contradiction]
    more_votes: int


def calibrate(
    votes: Sequence[Vote], verdicts: Sequence[Verdict], failures: Iterable[JudgingFailure] = (), *, seed: int = 0
) -> list[Calibration]:
    """One calibration for each judge of `verdicts` that judged something that was voted on, by name.

    A vote without a turn is on the verdict of the whole conversation, or on the only turn that was judged; one on the first
    turn is on that of the whole conversation where no later turn was voted on. A pair of which one order is among `failures`
    was not judged. Raises `DataError` where no vote has a verdict, or a judge two on one item, by different prompts.
    """
    labels: dict[str, dict[Item, Winner | None]] = defaultdict(dict)
    prompts: dict[tuple[str, Item], str] = {}
    categories: dict[str, str] = {}
    for entry in compare_all(verdicts, failures):
        one = entry.one
        if entry.fate == "failed":
            continue
        item = (str(one.question_id), one.turn, one.model_a, one.model_b)
        if prompts.setdefault((one.judge, item), one.prompt) != one.prompt:
            raise DataError(
                f"{one.judge} judged question {one.question_id} by two prompts, {prompts[one.judge, item]} and {one.prompt}.",
                remedy="calibrate the folder of one prompt at a time",
            )
        labels[one.judge][item] = one.winner
        categories[item[0]] = categories.get(item[0]) or one.category
    given = group_votes(votes)
    for vote in votes:
        categories[vote.item[0]] = categories.get(vote.item[0]) or vote.category
    found = [
        _calibrate(judge, _match(own, given), given, categories, len(votes), seed) for judge, own in sorted(labels.items())
    ]
    found = [one for one in found if one.items]
    if not found:
        raise DataError(
            f"none of the {len(votes)} votes is on a pair that was judged.",
            remedy="question ids, models and turns must be those of the verdicts; --first-turn 1 where the votes count from 1",
        )
    return found


def _match(own: dict[Item, Winner | None], given: Collection[Item]) -> dict[Item, Winner | None]:
    """The judge's labels by the items that were voted on."""
    turns: dict[tuple[str, str, str], list[Item]] = defaultdict(list)
    for item in own:
        turns[item[0], item[2], item[3]].append(item)
    voted_later = {(question, model_a, model_b) for question, turn, model_a, model_b in given if turn}
    matched = {}
    for item in given:
        pair = item[0], item[2], item[3]
        same = turns[pair]
        is_whole = item[1] is None or (item[1] == 0 and pair not in voted_later and same and same[0][1] is None)
        if item in own:
            matched[item] = own[item]
        elif len(same) == 1 and is_whole:
            matched[item] = own[same[0]]
    return matched


def _calibrate(
    judge: str,
    labels: dict[Item, Winner | None],
    given: dict[Item, list[Winner | None]],
    categories: dict[str, str],
    votes: int,
    seed: int,
) -> Calibration:
    pairs: dict[Item, list[LabelPair]] = {
        item: [(label, vote) for vote in given[item] if vote is not None] for item, label in labels.items()
    }
    read = {item: found for item, found in pairs.items() if labels[item] is not None and found}
    people = {item: given[item] for item in read}
    agreement = _both_ways(read, seed)
    among = {item: pair_among({item: found}) for item, found in people.items()}
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    for label, vote in (pair for found in read.values() for pair in found):
        confusion[str(label)][str(vote)] += 1
    names = sorted({categories[item[0]] for item in read})
    everything = [vote for found in given.values() for vote in found]
    no_winner = everything.count(None)
    compared = sum(len(found) for found in read.values())
    unread = sum(len(found) for item, found in pairs.items() if labels[item] is None)
    return Calibration(
        judge=judge,
        votes=votes,
        items=len(read),
        compared=compared,
        unread=unread,
        no_winner=no_winner,
        repeated=votes - len(everything),
        without_verdict=len(everything) - no_winner - compared - unread,
        agreement=agreement,
        human=_both_ways(among, seed, is_told_apart=False) if any(among.values()) else None,
        human_alpha=krippendorff_alpha(people.values()),
        by_category={
            name: _both_ways({item: found for item, found in read.items() if categories[item[0]] == name}, seed)
            for name in names
        },
        confusion={label: dict(sorted(counts.items())) for label, counts in sorted(confusion.items())},
        contradictions=_contradictions(labels, people),
        more_votes=_more_votes(agreement.with_ties.rate),
    )


def _both_ways(pairs: dict[Item, list[LabelPair]], seed: int, *, is_told_apart: bool = True) -> BothWays:
    """`is_told_apart`: the first label of each pair is the judge's; else either may be anybody's."""
    return BothWays(
        with_ties=_agreed(pairs, seed, ties=True, is_told_apart=is_told_apart),
        no_ties=_agreed(pairs, seed, ties=False, is_told_apart=is_told_apart),
    )


def _agreed(pairs: dict[Item, list[LabelPair]], seed: int, *, ties: bool, is_told_apart: bool) -> Agreed:
    kept = [(item[0], pair) for item, found in pairs.items() for pair in found if ties or TIE not in pair]
    labels = [pair for _, pair in kept]
    counted = count_agreement(labels)
    rate = estimate_share(
        [None if None in pair else float(pair[0] == pair[1]) for pair in labels], [name for name, _ in kept], seed=seed
    )
    kappa = cohen_kappa(labels if is_told_apart else mirror(labels))
    return Agreed(agree=counted.agree, total=counted.total, rate=rate, kappa=kappa)


def _contradictions(labels: dict[Item, Winner | None], people: dict[Item, list[Winner | None]]) -> list[Contradiction]:
    """Where more than half of the votes say one thing and the judge another."""
    found = []
    for item, given in people.items():
        counts = Counter(str(vote) for vote in given if vote is not None)
        most, times = counts.most_common(1)[0]
        if 2 * times <= counts.total() or most == labels[item]:
            continue
        found.append(
            Contradiction(
                question_id=item[0],
                turn=item[1],
                model_a=item[2],
                model_b=item[3],
                judge_says=str(labels[item]),
                votes=dict(sorted(counts.items())),
                is_opposite=TIE not in (most, labels[item]),
            )
        )
    return found


def _more_votes(rate: Estimate) -> int:
    """An interval's width falls with the root of n, where the further votes are as alike within a question as these."""
    if rate.low is None or rate.high is None:
        return 0
    half = (rate.high - rate.low) / 2
    return max(0, math.ceil(rate.n * (half / MARGIN) ** 2) - rate.n)
