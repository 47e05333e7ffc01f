"""`Verdict`: what a judge said, once, of one answer or of two; `Comparison`: both orders of a pair as one result.

Invariants: what could not be read has no outcome and no scores, and is never a number; a pair is won only where every order
that was asked says so. It ignores who asked the judge, and what is made of the results.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from chaccu.judge.json_lines import read_json_lines

Outcome = Literal["first", "second", "tie"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One judge on one question.

    `models`: in the order in which their answers were shown; two of a comparison, one of a grade. `turn`: from 0, the one that
    was judged; None for the whole conversation. `outcome`: of a comparison; `scores`: one for each of `models`, where a prompt
    asks for them; both None where nothing could be read. `judge`: the name that was asked; `judge_version`: the one that the
    server answered with, if it did. `prompt`, `prompt_sha256`: the judge's prompt and the hash of its file. `key`: SHA-256 of
    all that was asked. `attempts`: times it was asked, until its text could be read or it was given up. `flags`: what makes the
    verdict doubtful, by name. `prompt_tokens`, `answer_tokens`: of all attempts, None if the server does not say.
    """

    key: str
    question_id: int | str
    category: str
    turn: int | None
    models: tuple[str, ...]
    judge: str
    judge_version: str | None = None
    prompt: str
    prompt_sha256: str
    outcome: Outcome | None = None
    scores: tuple[float, ...] | None = None
    text: str
    finish_reason: str = ""
    attempts: int = 1
    flags: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    @property
    def is_comparison(self) -> bool:
        return len(self.models) == 2

    @property
    def is_parsed(self) -> bool:
        return self.outcome is not None or self.scores is not None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A pair on one question by one judge. `model_a` comes before `model_b` by name.

    `winner` is None where a verdict could not be read. `is_flip`: the orders contradict one another, each for the answer that
    stood in the same place: a tie, told apart. `is_consistent`: both orders were asked and say the same.
    """

    question_id: int | str
    category: str
    turn: int | None
    judge: str
    prompt: str
    model_a: str
    model_b: str
    winner: Literal["model_a", "model_b", "tie"] | None
    is_flip: bool = False
    is_consistent: bool = False
    orders: int = 1


def compare_orders(verdicts: Iterable[Verdict]) -> list[Comparison]:
    """The comparisons among `verdicts`, each question and pair once, in the order in which they first come.

    A model wins a pair of which both orders were asked where both say so, as in MT-bench (Zheng et al. 2023); what they do not
    agree on is a tie. Of an order that is there twice, the last counts.
    """
    orders: dict[tuple[int | str, int | None, str, str, frozenset[str]], dict[str, Verdict]] = {}
    for one in verdicts:
        if one.is_comparison:
            pair = (one.question_id, one.turn, one.judge, one.prompt, frozenset(one.models))
            orders.setdefault(pair, {})[one.models[0]] = one
    return [_join(list(pair.values())) for pair in orders.values()]


def _join(orders: list[Verdict]) -> Comparison:
    model_a, model_b = sorted(orders[0].models)
    outcomes = [one.outcome for one in orders]
    winners = [_winner(one, model_a) for one in orders]
    winner = None if None in winners else winners[0] if len(set(winners)) == 1 else "tie"
    return Comparison(
        question_id=orders[0].question_id,
        category=orders[0].category,
        turn=orders[0].turn,
        judge=orders[0].judge,
        prompt=orders[0].prompt,
        model_a=model_a,
        model_b=model_b,
        winner=winner,
        is_flip=len(orders) == 2 and outcomes[0] == outcomes[1] and outcomes[0] in ("first", "second"),
        is_consistent=len(orders) == 2 and winner is not None and winners[0] == winners[1],
        orders=len(orders),
    )


def _winner(verdict: Verdict, model_a: str) -> Literal["model_a", "model_b", "tie"] | None:
    if verdict.outcome in (None, "tie"):
        return verdict.outcome
    won = verdict.models[0 if verdict.outcome == "first" else 1]
    return "model_a" if won == model_a else "model_b"


def read_verdicts(file: Path) -> list[Verdict]:
    """The verdicts of a JSONL file; a last line without its end is not read. Raises `StorageError`, `DataError`."""
    return read_json_lines(file, Verdict, "verdict", grows=True)
