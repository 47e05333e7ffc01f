"""`check_answers`: which answers meet the rules of their questions; `count_checks`: the shares, by model and category.

Invariants: of each model, checked questions = passed + failed + unchecked + missing; a share counts the first two only, and the
others are named beside it. A question is passed where all its rules are met. It ignores questions without rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from chaccu.errors import DataError
from chaccu.judge.answers import Answer
from chaccu.judge.checks import Check, PythonCheck, check_kind, meets_check
from chaccu.judge.code_run import require_confinement, run_python_check
from chaccu.judge.questions import Question
from chaccu.rank.win_rate import wilson_interval

ALL_CATEGORIES = "all"

Outcome = Literal["passed", "failed", "unchecked", "missing"]


class CheckedQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """What the rules say of one model's answers to one question. `reasons`: each rule that was not met or not asked."""

    question_id: int | str
    category: str
    model: str
    outcome: Outcome
    reasons: tuple[str, ...] = ()


class CheckCount(msgspec.Struct, frozen=True, kw_only=True):
    """`share` = passed / (passed + failed) with its 95 % interval by Wilson; None where nothing was checked."""

    model: str
    category: str
    passed: int
    failed: int
    unchecked: int
    missing: int
    share: float | None
    interval: tuple[float, float] | None


def check_answers(
    questions: Sequence[Question],
    answers: Iterable[Answer],
    models: Sequence[str] | None = None,
    *,
    run_code: bool = False,
    on_done: Callable[[CheckedQuestion], None] | None = None,
) -> list[CheckedQuestion]:
    """The answers of `models` (those of the answers, if None) to all questions that have rules.

    `run_code`: run the code of answers too, confined; without it those questions are unchecked. A question of which a rule's
    turn has no answer is missing. Raises `UsageError` where code cannot be confined, `DataError` where a model has two
    different answers to one turn.
    """
    if run_code and any(isinstance(check, PythonCheck) for question in questions for check in question.checks):
        require_confinement()
    texts: dict[tuple[str, int | str, int], str] = {}
    for one in answers:
        if texts.setdefault((one.model, one.question_id, one.turn), one.text) != one.text:
            raise DataError(
                f"{one.model} has two different answers to turn {one.turn} of question {one.question_id}.",
                remedy="run the command that asked them again to its end, or into a folder of its own",
            )
    asked = models if models is not None else sorted({model for model, _, _ in texts})
    results = []
    for question in questions:
        if not question.checks:
            continue
        for model in asked:
            found = {check.turn: texts.get((model, question.question_id, check.turn)) for check in question.checks}
            result = _check_question(question, model, found, run_code=run_code)
            results.append(result)
            if on_done:
                on_done(result)
    return results


def name_category(category: str) -> str:
    """A category's name in figures: never that of all of them."""
    return f"{ALL_CATEGORIES} (a category)" if category == ALL_CATEGORIES else category


def count_checks(results: Iterable[CheckedQuestion]) -> list[CheckCount]:
    """Counts of each model: by category, in the order they come, and of `ALL_CATEGORIES` first."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for one in results:
        groups.setdefault((one.model, ALL_CATEGORIES), []).append(one.outcome)
        groups.setdefault((one.model, name_category(one.category)), []).append(one.outcome)
    order = list(dict.fromkeys(model for model, _ in groups))
    ordered = sorted(groups.items(), key=lambda one: order.index(one[0][0]))
    return [_count(model, category, outcomes) for (model, category), outcomes in ordered]


def _check_question(question: Question, model: str, found: dict[int, str | None], *, run_code: bool) -> CheckedQuestion:
    reasons: list[str] = []
    outcome: Outcome = "passed"
    for check in question.checks:
        text = found[check.turn]
        if text is None:
            outcome, reasons = "missing", [f"turn {check.turn} has no answer"]
            break
        met, reason = _check(text, check, run_code=run_code)
        if met is None and outcome == "passed":
            outcome = "unchecked"
        elif met is False:
            outcome = "failed"
        if reason:
            reasons.append(reason)
    return CheckedQuestion(
        question_id=question.question_id, category=question.category, model=model, outcome=outcome, reasons=tuple(reasons)
    )


def _check(text: str, check: Check, *, run_code: bool) -> tuple[bool | None, str]:
    if not isinstance(check, PythonCheck):
        return (True, "") if meets_check(text, check) else (False, f"{check_kind(check)} not met")
    if not run_code:
        return None, "code not run"
    return run_python_check(text, check)


def _count(model: str, category: str, outcomes: Sequence[Outcome]) -> CheckCount:
    passed, failed = outcomes.count("passed"), outcomes.count("failed")
    checked = passed + failed
    return CheckCount(
        model=model,
        category=category,
        passed=passed,
        failed=failed,
        unchecked=outcomes.count("unchecked"),
        missing=outcomes.count("missing"),
        share=passed / checked if checked else None,
        interval=wilson_interval(passed / checked, checked) if checked else None,
    )
