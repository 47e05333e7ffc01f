"""The shipped sets: whole, right by their own rules, and nobody else's questions."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from importlib import resources
from itertools import combinations
from pathlib import Path

import pytest

from chaccu.errors import UsageError
from chaccu.judge.checks import PythonCheck, meets_check
from chaccu.judge.code_run import require_confinement, run_python_check
from chaccu.judge.questions import SET_VERSIONS, list_question_sets, load_question_sets, load_questions

# Each set's version and the SHA-256 of its file: whoever changes a question raises SET_VERSIONS, and then this.
CONTENTS = {
    "chaccu-100": (2, "3046c66195d5dfb4ec951d048ddca4e355fa9bad0b397c555f674f0eabb5edf2"),
    "checked": (2, "6f2a43f0422b31faf04028e65f3a473ce588c64ba0256178dfebcb3136b3645b"),
    "starter": (1, "10e751702aad4d1fa5801f50fa20f4be6116a258bd26ef966fab66e5fedeee32"),
}
SHARED = Path(__file__).parents[3].parent / "shared" / "data"
OTHERS = ("mt_bench/question.jsonl", "mt_bench/vicuna_bench_question.jsonl", "vicuna_blog/questions.jsonl")
# Of the runs of four words of the shorter text; wordings that differ in a name or a number share more.
MOST_IN_COMMON = 0.5


def runs_of(text: str, length: int = 4) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[place : place + length]) for place in range(max(1, len(words) - length + 1))}


def in_common(left: str, right: str) -> float:
    a, b = runs_of(left), runs_of(right)
    return len(a & b) / min(len(a), len(b))


def test_a_hundred_questions_in_ten_categories() -> None:
    questions = load_questions("chaccu-100")
    categories = "generic knowledge roleplay common-sense fermi counterfactual coding math writing multi-turn"
    assert Counter(one.category for one in questions) == dict.fromkeys(categories.split(), 10)
    assert {len(one.turns) for one in questions if one.category == "multi-turn"} == {3}
    for one in questions:
        if one.category in ("math", "coding", "knowledge", "fermi", "common-sense"):
            assert one.reference is not None, one.question_id
        if one.category in ("math", "coding", "fermi"):
            assert one.temperature == 0.0
        if one.category in ("writing", "roleplay"):
            assert one.temperature == 0.7


def test_the_checked_set_has_rules_for_every_question() -> None:
    questions = load_questions("checked")
    assert len(questions) >= 40
    assert all(one.checks and one.temperature == 0.0 for one in questions)
    without_code = [one for one in questions if not any(isinstance(check, PythonCheck) for check in one.checks)]
    assert len(without_code) >= 40


@pytest.mark.parametrize("name", ["checked", "chaccu-100"])
def test_reference_answers_meet_the_rules_and_chatter_does_not(name: str) -> None:
    for one in load_questions(name):
        assert one.reference is not None or not one.checks
        rules = [check for check in one.checks if not isinstance(check, PythonCheck)]
        for check in rules:
            assert one.reference is not None
            assert meets_check(one.reference[check.turn], check), one.question_id
        if rules:
            assert not all(meets_check("I am a language model. How can I help you?", check) for check in rules), one.question_id


def test_reference_code_runs_right() -> None:
    try:
        require_confinement()
    except UsageError as error:
        pytest.skip(str(error))
    checked = 0
    for one in load_question_sets(["checked", "chaccu-100"]):
        for check in one.checks:
            if isinstance(check, PythonCheck):
                assert one.reference is not None
                assert run_python_check(one.reference[check.turn], check) == (True, ""), one.question_id
                checked += 1
    assert checked >= 13


def test_a_set_that_has_changed_has_another_version() -> None:
    folder = resources.files("chaccu.judge") / "question_sets"
    files = {name: (folder / f"{name}.jsonl").read_bytes() for name in list_question_sets()}
    assert {name: (SET_VERSIONS[name], hashlib.sha256(data).hexdigest()) for name, data in files.items()} == CONTENTS


def test_no_question_is_nearly_another_of_its_set() -> None:
    for name in list_question_sets():
        texts = [" ".join(one.turns) for one in load_questions(name)]
        # What small questions say alike, of form alone: "and write nothing else", "Answer with the number only".
        texts = [
            re.sub(r"(?i)(,? and )?write nothing else|answer with[^.:]*only|end with[^.]*alone[^.]*", "", text)
            for text in texts
        ]
        near = [(a, b) for a, b in combinations(texts, 2) if in_common(a, b) > MOST_IN_COMMON]
        assert near == []


@pytest.mark.parametrize("other", OTHERS)
def test_no_question_is_nearly_one_of_a_known_bench(other: str) -> None:
    if not (SHARED / other).is_file():
        pytest.skip(f"there is no {SHARED / other}")
    theirs = [text for one in load_questions(str(SHARED / other)) for text in one.turns]
    ours = [(one, text) for name in list_question_sets() for one in load_questions(name) for text in one.turns]
    near = [(one.question_id, text) for one, text in ours if any(in_common(text, their) > 0.3 for their in theirs)]
    assert near == []


def test_the_measure_of_nearness_sees_a_changed_name() -> None:
    first = "How many umbrellas are left behind in the trains of Lima in a year?"
    assert in_common(first, first.replace("Lima", "Cuzco")) > MOST_IN_COMMON
    assert in_common(first, "How many grains of rice are in a bag of one kilogram?") == 0
