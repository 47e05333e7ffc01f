from __future__ import annotations

import msgspec
import pytest

from chaccu.errors import DataError, UsageError
from chaccu.judge import code_run
from chaccu.judge.answers import Answer
from chaccu.judge.checking import CheckedQuestion, check_answers, count_checks
from chaccu.judge.checks import ExactCheck, NumberCheck, PythonCase, PythonCheck
from chaccu.judge.questions import Question
from chaccu.testing.answers import build_answer

CODE = PythonCheck(function="f", cases=(PythonCase(args=(), returns=1),))
QUESTIONS = [
    Question(1, "math", ("1 + 1?",), checks=(NumberCheck(value=2),)),
    Question(2, "chat", ("Hello?", "And?"), checks=(ExactCheck(any_of=("Hi",)), NumberCheck(value=3, turn=1))),
    Question(3, "code", ("f?",), checks=(CODE,)),
    Question(4, "writing", ("A poem.",)),
]


def answer(question_id: int, text: str, model: str = "base", turn: int = 0) -> Answer:
    return build_answer(question_id, model, text, turn=turn, category="?", tokens=None)


ANSWERS = [
    answer(1, "It is 2."),
    answer(2, "Hi"),
    answer(2, "4", turn=1),
    answer(3, "def f(): return 1"),
    answer(4, "Roses."),
    answer(1, "3", "tuned"),
]


def test_every_question_with_rules_has_one_outcome_a_model() -> None:
    results = check_answers(QUESTIONS, ANSWERS)
    assert [(one.question_id, one.model, one.outcome, one.reasons) for one in results] == [
        (1, "base", "passed", ()),
        (1, "tuned", "failed", ("number not met",)),
        (2, "base", "failed", ("number not met",)),
        (2, "tuned", "missing", ("turn 0 has no answer",)),
        (3, "base", "unchecked", ("code not run",)),
        (3, "tuned", "missing", ("turn 0 has no answer",)),
    ]


def test_a_model_without_any_answer_is_missing_all() -> None:
    assert [one.outcome for one in check_answers(QUESTIONS, ANSWERS, ["gone"])] == ["missing"] * 3


def test_code_is_run_when_asked_for() -> None:
    pytest.importorskip("resource")
    results = check_answers(QUESTIONS[2:3], ANSWERS, ["base"], run_code=True)
    assert [one.outcome for one in results] == ["passed"]


def test_shares_count_what_was_checked() -> None:
    counts = count_checks(check_answers(QUESTIONS, ANSWERS))
    assert [(one.model, one.category, one.passed, one.failed, one.unchecked, one.missing) for one in counts] == [
        ("base", "all", 1, 1, 1, 0),
        ("base", "math", 1, 0, 0, 0),
        ("base", "chat", 0, 1, 0, 0),
        ("base", "code", 0, 0, 1, 0),
        ("tuned", "all", 0, 1, 0, 2),
        ("tuned", "math", 0, 1, 0, 0),
        ("tuned", "chat", 0, 0, 0, 1),
        ("tuned", "code", 0, 0, 0, 1),
    ]
    total = counts[0]
    assert total.share == 0.5
    assert total.interval == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert msgspec.to_builtins(counts[3])["interval"] is None


def test_two_different_answers_to_one_turn_are_not_chosen_from() -> None:
    check_answers(QUESTIONS, [answer(1, "2"), answer(1, "2")])
    with pytest.raises(DataError, match="base has two different answers to turn 0 of question 1"):
        check_answers(QUESTIONS, [answer(1, "2"), answer(1, "3")])


def test_code_that_cannot_be_confined_is_refused_before_anything_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_run.sys, "platform", "darwin")
    seen: list[CheckedQuestion] = []
    with pytest.raises(UsageError, match="and this is darwin"):
        check_answers(QUESTIONS, ANSWERS, run_code=True, on_done=seen.append)
    assert seen == []
    assert len(check_answers(QUESTIONS[:2], ANSWERS, run_code=True)) == 4


def test_code_that_was_not_run_in_time_is_unchecked() -> None:
    pytest.importorskip("resource")
    slow = PythonCheck(function="f", cases=CODE.cases, timeout_s=0.001)
    (result,) = check_answers([Question(3, "code", ("f?",), checks=(slow,))], ANSWERS, ["base"], run_code=True)
    assert (result.outcome, result.reasons) == ("unchecked", ("the process that runs code was not ready within 0.001 s",))
