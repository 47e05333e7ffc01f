"""The rules of the shipped sets: right answers pass in whatever form they come, wrong ones do not."""

from __future__ import annotations

import pytest

from chaccu.errors import UsageError
from chaccu.judge.checks import PythonCheck, meets_check
from chaccu.judge.code_run import require_confinement, run_python_check
from chaccu.judge.questions import Question, load_question_sets

RIGHT: dict[str, list[str]] = {
    "checked-arithmetic-1": [
        "**7**",
        "7.",
        "3 + 4 = 7",
        "Seven",
        r"The answer is \boxed{7}.",
        "7\n\nFirst 3, and then 4 more.",
    ],
    "checked-arithmetic-10": ["183", "1,000 − 268 = 732, and 732 / 4 = 183.", "One hundred and eighty-three"],
    "checked-copying-1": ["Lantern", "`lantern`", "lantern."],
    "checked-copying-4": ["**QX-77-bravo**", "`QX-77-bravo`", "QX\u201177\u2011bravo"],
    "checked-copying-6": ["**WE MEET AT NOON**", "WE MEET AT NOON."],
    "checked-spelling-1": ["G", '"g"', "**g**."],
    "checked-spelling-3": ["C-A-T", "c\u2011a\u2011t"],
    "checked-facts-3": ["We live on **Earth**."],
    "checked-facts-5": ["7 days", "Seven", "A week has seven days.", "**7**"],
    "checked-facts-6": ["Eight legs.", "A spider has 8 legs."],
    "checked-facts-10": ["The symbol is **Au**.", "Au (from Latin: aurum)"],
    "checked-facts-11": ["They take CO₂ from the air.", "Carbon dioxide (CO2)"],
    "checked-facts-12": ["The Kelvin scale", "Rankine"],
    "checked-lists-1": ["Here are three:\n- apple\n- fig\n- plum"],
    "checked-lists-4": ["1,2,3,4,5,6", "**1, 2, 3, 4, 5, 6**", "`1, 2, 3, 4, 5, 6`."],
    "checked-lists-6": ["apple, fig, pear.", "**Apple, fig, pear**"],
    "checked-format-1": ["Yes.", "**Yes**", "YES!"],
    "checked-format-3": ["A vast blue expanse.", "The sea is a large body of saltwater."],
    "checked-format-4": ['"Today it is raining."', "**Today**, a soft drizzle fell on the town."],
    "checked-format-5": ['"The express is late!"', "**All aboard the train!**"],
    "checked-format-6": ["GOOD MORNING!", "HI THERE"],
    "checked-format-7": ["A reflective surface.", "It reflects light."],
    "checked-format-9": [
        "Bonjour ! Comment as-tu dormi ?",
        "Bonjour, avez-vous bien dormi ?",
        "Bonjour ! Tu as bien dormi cette nuit ?",
        "**Bonjour**, comment avez-vous dormi ?",
    ],
    "checked-json-2": ['```json\n{"country": "Peru", "city": "Lima"}\n```', '`{"city": "Lima", "country": "Peru"}`'],
    "checked-reasoning-4": ["No.", "no!"],
    "math-3": ["29/44", "0.659", r"\frac{29}{44}", r"$\boxed{\dfrac{29}{44}}$", "145/220 = 29/44 ≈ 0.6591", "**.659**"],
    "math-6": ["The price was\n\n50.00", r"\boxed{50}: 50 · 1.122 = 56.10", "fifty"],
    "math-9": ["10°", "The angle is ten degrees."],
    "multi-turn-5": ["Cho and Ana", "Cho, Dee, Ana, Ben, so beside her sit:\n**Ana and Cho**.", "Ana, Cho"],
}
WRONG: dict[str, list[str]] = {
    "checked-arithmetic-1": ["3 + 4", "8", "7 or 8", "The digits are 7, then 5."],
    "checked-copying-4": ["qx-77-bravo", "QX-77-bravo, QX-77-bravo"],
    "checked-copying-6": ["We meet at noon", "WE MEET AT NOON TODAY"],
    "checked-facts-5": ["7, no, 8", "77", "Seventeen"],
    "checked-facts-10": ["Ag", "AU", "Gold"],
    "checked-lists-1": ["* apple\n* fig\n* plum", "- apple\n- fig"],
    "checked-format-3": ["I cannot help with that.", "The sea" + " is blue and" * 9],
    "checked-format-4": ["Today I am a language model.", "It rains today."],
    "checked-format-5": ["How can I help you today!", "The train is here."],
    "checked-format-6": ["Hello!", "NO."],
    "checked-format-8": ["You can see the forest in the picture.\n" * 5, "word " * 40],
    "checked-format-9": [
        "Good morning! How did you sleep last night?",
        "Bonjour",
        "Bonjour! How did you sleep?",
        "Bonjour, ça va bien ce matin ?",
    ],
    "math-3": ["0.65", "66 %", "29"],
    "multi-turn-5": ["Ben and Ana", "Ben, Cho and Ana", "Cho and Ben have changed places.\nBen and Ana", "Cho, Dee, Ana, Ben"],
}
# Code that is right where a function is used plainly.
WRONG_CODE = {
    "coding-3": """
def add_tag(tag, tags=None):
    tags = [] if tags is None else tags
    if tag.lower() not in tags:
        tags.append(tag.lower())
    return tags
""",
    "coding-4": r"""
import re

def is_balanced(text):
    text = re.sub(r'"(\\.|[^"\\])*"', "", text)
    if '"' in text:
        return False
    counts = [0, 0, 0]
    for letter in text:
        if letter in "([{":
            counts["([{".index(letter)] += 1
        elif letter in ")]}":
            counts[")]}".index(letter)] -= 1
            if min(counts) < 0:
                return False
    return not any(counts)
""",
    "coding-8": "def evaluate(expression): return eval(expression)",
    "coding-9": """
def build_order(needs):
    order = []
    while len(order) < len(needs):
        ready = sorted(one for one in needs if one not in order and set(needs[one]) <= set(order))
        if not ready:
            return None
        order += ready
    return order
""",
}


@pytest.fixture(scope="module")
def questions() -> dict[int | str, Question]:
    return {one.question_id: one for one in load_question_sets(["checked", "chaccu-100"]) if one.checks}


def meets_all(answer: str, question: Question) -> bool:
    """By the rules of the last turn that has some; there must be one that does not run code."""
    last = max(check.turn for check in question.checks)
    rules = [check for check in question.checks if check.turn == last and not isinstance(check, PythonCheck)]
    assert rules
    return all(meets_check(answer, check) for check in rules)


@pytest.mark.parametrize(("name", "answer"), [(name, answer) for name, answers in RIGHT.items() for answer in answers])
def test_a_right_answer_passes_in_another_form(questions: dict[int | str, Question], name: str, answer: str) -> None:
    assert meets_all(answer, questions[name])


@pytest.mark.parametrize(("name", "answer"), [(name, answer) for name, answers in WRONG.items() for answer in answers])
def test_a_wrong_answer_does_not_pass(questions: dict[int | str, Question], name: str, answer: str) -> None:
    assert not meets_all(answer, questions[name])


def test_a_model_that_repeats_what_it_is_asked_passes_nothing(questions: dict[int | str, Question]) -> None:
    for one in questions.values():
        if not all(isinstance(check, PythonCheck) for check in one.checks):
            for times in range(1, 6):
                assert not meets_all("\n".join([one.turns[-1]] * times), one), one.question_id


@pytest.mark.parametrize("name", WRONG_CODE)
def test_code_that_is_nearly_right_does_not_pass(questions: dict[int | str, Question], name: str) -> None:
    try:
        require_confinement()
    except UsageError as error:
        pytest.skip(str(error))
    (check,) = questions[name].checks
    assert isinstance(check, PythonCheck)
    assert run_python_check(WRONG_CODE[name], check)[0] is False
