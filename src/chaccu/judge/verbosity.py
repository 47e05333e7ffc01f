"""`measure_verbosity`: does the judge prefer the longer answer, and what is left of a win rate at equal length.

Invariants: comparisons whose answers are not on file are counted as `unknown`, and are in no figure. It ignores every trait of
an answer but its characters; over whole conversations the turns are added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from chaccu.judge.answers import Answer
from chaccu.judge.intervals import Estimate, estimate_share
from chaccu.judge.tallies import Compared
from chaccu.rank import LengthControlled, control_length

LEAST_CONTROLLED = 20
# Upper ends of the buckets: how many times as long the longer answer is.
_BUCKETS = ((1.1, "up to 1.1 times as long"), (1.5, "1.1 to 1.5 times"), (2.0, "1.5 to 2 times"), (math.inf, "over 2 times"))


class LengthBucket(msgspec.Struct, frozen=True, kw_only=True):
    """How often the longer answer wins (a tie is half a win) where it is so many times as long."""

    longer: str
    win_rate: Estimate


class Verbosity(msgspec.Struct, frozen=True, kw_only=True):
    """`longer_wins`: over all comparisons of unequal length. `unknown`: comparisons without both answers on file."""

    judge: str
    unknown: int
    equal: int
    longer_wins: Estimate
    buckets: list[LengthBucket]


class EqualLength(msgspec.Struct, frozen=True, kw_only=True):
    """The win rate `model` would have against `other` at equal length; `figures` is None with fewer than `LEAST_CONTROLLED`
    comparisons of known and unequal length, `n` of them: too few to tell the effect of length from chance."""

    judge: str
    model: str
    other: str
    n: int
    figures: LengthControlled | None


class MeanLength(msgspec.Struct, frozen=True, kw_only=True):
    """Mean characters of a model's answers over `n` turns."""

    model: str
    n: int
    chars: float


def mean_lengths(answers: Iterable[Answer]) -> list[MeanLength]:
    """By model."""
    lengths: dict[str, list[int]] = {}
    for one in answers:
        lengths.setdefault(one.model, []).append(len(one.text))
    return [MeanLength(model=name, n=len(own), chars=sum(own) / len(own)) for name, own in sorted(lengths.items())]


def find_lengths(compared: Iterable[Compared], answers: Mapping[tuple[str, int, str], Answer]) -> list[tuple[int, int] | None]:
    """Characters of both answers of each comparison, `model_a` first; None where one is not on file."""
    whole: dict[tuple[str, str], int] = {}
    for (question, _, model), answer in answers.items():
        whole[question, model] = whole.get((question, model), 0) + len(answer.text)
    found: list[tuple[int, int] | None] = []
    for entry in compared:
        one, question = entry.one, str(entry.one.question_id)
        if one.turn is None:
            ours, theirs = (whole.get((question, model)) for model in (one.model_a, one.model_b))
        else:
            texts = [answers.get((question, one.turn, model)) for model in (one.model_a, one.model_b)]
            ours, theirs = (None if text is None else len(text.text) for text in texts)
        found.append(None if ours is None or theirs is None else (ours, theirs))
    return found


def measure_verbosity(
    compared: list[Compared], answers: Mapping[tuple[str, int, str], Answer], *, seed: int = 0
) -> list[Verbosity]:
    """One for each judge, by name; of the counted comparisons."""
    counted = [one for one in compared if one.share is not None]
    lengths = find_lengths(counted, answers)
    judges: dict[str, list[Any]] = {}
    for one, both in zip(counted, lengths, strict=True):
        judges.setdefault(one.one.judge, []).append((one, both))
    return [_measure(judge, own, seed) for judge, own in sorted(judges.items())]


def control_lengths(
    compared: Iterable[Compared], answers: Mapping[tuple[str, int, str], Answer], *, baseline: str | None = None
) -> list[EqualLength]:
    """For each pair and judge with answers on file, the length-controlled win rate (`rank.control_length`), by question."""
    counted = [one for one in compared if one.share is not None]
    groups: dict[tuple[str, str, str], list[tuple[float, int, int, str]]] = {}
    for entry, both in zip(counted, find_lengths(counted, answers), strict=True):
        if both is None or entry.share is None:
            continue
        one, question = entry.one, str(entry.one.question_id)
        if one.model_a == baseline:
            groups.setdefault((one.model_b, one.model_a, one.judge), []).append((1 - entry.share, both[1], both[0], question))
        else:
            groups.setdefault((one.model_a, one.model_b, one.judge), []).append((entry.share, *both, question))
    found = []
    for (model, other, judge), rows in sorted(groups.items()):
        n = sum(ours != theirs for _, ours, theirs, _ in rows)
        figures = None
        if n >= LEAST_CONTROLLED:
            shares, questions = [row[0] for row in rows], [row[3] for row in rows]
            figures = control_length(shares, [row[1] for row in rows], [row[2] for row in rows], clusters=questions)
        found.append(EqualLength(judge=judge, model=model, other=other, n=n, figures=figures))
    return found


def _measure(judge: str, own: list[tuple[Compared, tuple[int, int] | None]], seed: int) -> Verbosity:
    shares: list[float] = []
    ratios: list[float] = []
    questions: list[int | str] = []
    equal = 0
    for one, both in own:
        if both is None or one.share is None:
            continue
        if both[0] == both[1]:
            equal += 1
            continue
        shares.append(one.share if both[0] > both[1] else 1 - one.share)
        ratios.append(max(both) / min(both) if min(both) else math.inf)
        questions.append(one.one.question_id)
    buckets = []
    least = 1.0
    for most, name in _BUCKETS:
        kept = [share if least < ratio <= most else None for share, ratio in zip(shares, ratios, strict=True)]
        buckets.append(LengthBucket(longer=name, win_rate=estimate_share(kept, questions, seed=seed)))
        least = most
    return Verbosity(
        judge=judge,
        unknown=sum(both is None for _, both in own),
        equal=equal,
        longer_wins=estimate_share(shares, questions, seed=seed),
        buckets=buckets,
    )
