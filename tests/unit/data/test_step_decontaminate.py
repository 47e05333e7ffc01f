from __future__ import annotations

import json
from pathlib import Path

import pytest

from chaccu.data.outcome import Changed, Drop
from chaccu.data.steps.decontaminate import Decontaminate
from chaccu.errors import DataError, RecipeError

from .talks import talk, texts_of

LONG = (
    "A merchant buys nine crates of oranges for forty coins each and sells every crate at a gain of a quarter. How much is it?"
)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "exam.jsonl"
    lines = [
        {"question_id": 7, "turns": [LONG, "And for ten crates of pears instead of these?"]},
        {"id": "q8", "question": "Which river runs through the city of Ghent?"},
        {"prompt": "Who are you?"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (LONG, "exam:7"),
        (f"Please solve this.\n{LONG.upper()}\nThink step by step.", "exam:7"),
        ("sells every crate at a gain of a quarter how much is that in sum", "exam:7"),
        ("and for ten crates of pears, instead of these", "exam:7"),
        ("which river runs through the city of ghent", "exam:q8"),
        ("Tell me: which river runs through the city of Ghent? And why?", "exam:q8"),
        ("Which river runs through the old city of Ghent?", "exam:q8"),
    ],
)
def test_what_asks_an_evaluation_question_goes_by_its_name(questions: str, asked: str, name: str) -> None:
    step = Decontaminate(questions=(questions,), similarity=0.4)
    assert step(talk(asked, "a")) == Drop(f"asks evaluation question {name}")
    outcome = step(talk("something else", "fine", asked, "a"))
    assert isinstance(outcome, Changed)
    assert texts_of(outcome) == ["something else", "fine"]
    whole = Decontaminate(questions=(questions,), similarity=0.4, drop="conversation")
    assert whole(talk("something else", "fine", asked, "a")) == Drop(f"asks evaluation question {name}")


@pytest.mark.parametrize(
    "asked", ["Who are you?", "Which river is the longest?", "A merchant buys apples.", "", "How much is it for ten crates?"]
)
def test_other_questions_stay_and_answers_are_not_looked_at(questions: str, asked: str) -> None:
    conversation = talk(asked, LONG)
    assert Decontaminate(questions=(questions,))(conversation) is conversation


def test_the_shipped_questions_are_there_by_name() -> None:
    outcome = Decontaminate()(talk("Write a Python function that returns the largest number in a list!", "def f(): ..."))
    assert isinstance(outcome, Drop)
    assert outcome.reason.startswith("asks evaluation question starter:")
    whole = Decontaminate(questions=("chaccu-100",))(talk("About how many times does a person blink in a life?", "Often."))
    assert whole == Drop("asks evaluation question chaccu-100:fermi-8")


def test_files_are_described_by_hash_and_mistakes_are_named(questions: str, tmp_path: Path) -> None:
    (described,) = Decontaminate(questions=(questions,)).describe()["questions"]  # type: ignore[misc]
    assert described["name"] == "exam.jsonl"
    assert len(described["sha256"]) == 64
    with pytest.raises(RecipeError, match="none"):
        Decontaminate(questions=("none.jsonl",))
    bad = tmp_path / "bad.jsonl"
    for text, told in (("{", "line 1"), ('{"answer": "x"}', "holds no question")):
        bad.write_text(text)
        with pytest.raises(DataError, match=told):
            Decontaminate(questions=(str(bad),), min_words=4 + len(text))


def test_a_file_of_which_nothing_would_be_looked_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "exam.jsonl"
    lines = [{"question": "法国的首都是哪里?"}, {"question": "Who are you?"}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(RecipeError, match="has 5 words"):
        Decontaminate(questions=(str(path),))
    Decontaminate(questions=(str(path),), min_words=3)


def test_a_relative_path_is_that_of_the_folder_in_which_the_step_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    for place in ("Ghent", "Bruges"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "exam.jsonl").write_text(json.dumps({"question": f"Which river runs through {place}?"}))
        monkeypatch.chdir(tmp_path / place)
        steps.append(Decontaminate(questions=("exam.jsonl",)))
    monkeypatch.chdir(tmp_path)
    asked = talk("Which river runs through Ghent?", "a")
    assert steps[0](asked) == Drop("asks evaluation question exam:1")
    assert steps[1](asked) is asked
