"""`decide_gate`: is a candidate better than what it is to replace, by enough that it is no accident?

Invariants: promoted only where the run is complete enough and the lower end of the candidate's win rate is above the limit. The
win rate counts a tie as half a win; its interval goes by question, and its lower end is the lowest of a bootstrap's, Wilson's
and an exact sign test's (`intervals`), so that few questions, or few that are no ties, do not look certain. The confidence is
that of both ends: at 0.95 a candidate that is no better than the one in use passes at most one time in forty. It ignores which
model is which but by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from chaccu.errors import UsageError, did_you_mean
from chaccu.judge.intervals import sign_test_low
from chaccu.judge.judged_folder import JudgedFolders
from chaccu.judge.tallies import ALL, Compared, Tally, compare_all, tally_pairs

Decision = Literal["promoted", "not promoted", "incomplete"]


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """`missing` of `asked` comparisons have no result: unparsed, failed, shown in one order where others were shown in both, or
    lost by a run that was killed. `tally`, and `low`, the lower end that decides: None where nothing was counted. `unfinished`:
    folders without a manifest, of which nobody knows what else was to be asked; `replaced`: see `JudgedFolders`."""

    decision: Decision
    reason: str
    candidate: str
    baseline: str
    judges: list[str]
    min_win_rate: float
    confidence: float
    max_missing: float
    asked: int
    missing: int
    missing_share: float
    low: float | None
    tally: Tally | None
    unfinished: list[str]
    replaced: int

    @property
    def exit_code(self) -> int:
        return {"promoted": 0, "not promoted": 1, "incomplete": 2}[self.decision]


def decide_gate(
    judged: JudgedFolders,
    candidate: str,
    baseline: str,
    *,
    judges: Sequence[str] = (),
    min_win_rate: float = 0.5,
    confidence: float = 0.95,
    max_missing: float = 0.05,
    seed: int = 0,
) -> Gate:
    """Decide by the comparisons of the two models; `judges`: by these only, else by all, each judge's word for one.

    Raises `UsageError` where the two models, or a judge, are not among what was asked.
    """
    compared = _select(compare_all(judged.verdicts, judged.failures), candidate, baseline, judges)
    names = sorted({one.one.judge for one in compared})
    in_both = any(one.one.orders == 2 for one in compared)
    whole = [one for one in compared if one.share is not None and not (in_both and one.one.orders == 1)]
    asked = len(compared) + judged.lost
    missing = asked - len(whole)
    share = missing / asked
    tallies = tally_pairs(whole, baseline=baseline, level=confidence, seed=seed)
    tally = next((one for one in tallies if one.category == ALL), None)
    low = (
        None
        if tally is None or tally.win_rate.low is None
        else min(tally.win_rate.low, _exact_low(whole, candidate, confidence))
    )
    decision, reason = _decide(low, share, min_win_rate, max_missing)
    return Gate(
        decision=decision,
        reason=reason,
        candidate=candidate,
        baseline=baseline,
        judges=names,
        min_win_rate=min_win_rate,
        confidence=confidence,
        max_missing=max_missing,
        asked=asked,
        missing=missing,
        missing_share=share,
        low=low,
        tally=tally,
        unfinished=list(judged.unfinished),
        replaced=judged.replaced,
    )


def _exact_low(whole: list[Compared], candidate: str, confidence: float) -> float:
    shares = [one.share if one.one.model_a == candidate else 1 - one.share for one in whole if one.share is not None]
    return sign_test_low(shares, [one.one.question_id for one in whole], level=confidence)


def _decide(low: float | None, missing: float, min_win_rate: float, max_missing: float) -> tuple[Decision, str]:
    if low is None or missing > max_missing:
        return "incomplete", f"{missing:.1%} of the comparisons have no result; at most {max_missing:.1%} may be missing"
    if low > min_win_rate:
        return "promoted", f"the lower end of the win rate, {low:.2%}, is above {min_win_rate:.2%}"
    return "not promoted", f"the lower end of the win rate, {low:.2%}, is not above {min_win_rate:.2%}"


def _select(compared: list[Compared], candidate: str, baseline: str, judges: Sequence[str]) -> list[Compared]:
    if candidate == baseline:
        raise UsageError(f"{candidate} is to be compared with itself.", remedy="name the model in use with --against")
    models = sorted({model for one in compared for model in (one.one.model_a, one.one.model_b)})
    for name in (candidate, baseline):
        if name not in models:
            raise UsageError(
                f"no comparison has the model {name!r}.",
                remedy=did_you_mean(name, models) if models else "compare two models first: chaccu judge compare",
            )
    known = sorted({one.one.judge for one in compared})
    for judge in judges:
        if judge not in known:
            raise UsageError(f"no comparison is by the judge {judge!r}.", remedy=did_you_mean(judge, known))
    pair = {candidate, baseline}
    own = [one for one in compared if {one.one.model_a, one.one.model_b} == pair and (not judges or one.one.judge in judges)]
    if not own:
        raise UsageError(
            f"{candidate} and {baseline} were not compared with one another.", remedy="chaccu judge compare does it"
        )
    return own
