from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from chaccu.errors import DataError, StorageError, UsageError
from chaccu.judge import list_question_sets, load_questions


def test_the_starter_set_asks_twelve_things() -> None:
    assert "starter" in list_question_sets()
    questions = load_questions()
    counts = Counter(question.category for question in questions)
    assert counts == {"identity": 2, "knowledge": 2, "common-sense": 2, "writing": 2, "coding": 2, "math": 2}
    assert len({question.turns for question in questions}) == 12


def test_files_with_turns_or_text_are_read(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question_id": 7, "category": "math", "turns": ["One?", "And two?"]}\n\n{"question_id": "b", "text": "Hi?"}\n'
    )
    first, second = load_questions(str(file))
    assert (first.question_id, first.category, first.turns) == (7, "math", ("One?", "And two?"))
    assert (second.question_id, second.category, second.turns) == ("b", "generic", ("Hi?",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no question"),
        ("{}\n", "line 1 .* is no question"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}\n', "line 2 .* the id 1 is taken"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": "1", "turns": ["b"]}\n', "line 2 .* the id 1 is taken"),
        ('{"question_id": 1, "turns": []}\n', "asks nothing"),
        ('{"question_id": 1, "text": " "}\n', "asks nothing"),
        ('{"question_id": 1, "turns": ["a"\n', "line 1 .* is no question"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(DataError, match=says):
        load_questions(str(tmp_path / "q.jsonl"))


def test_unknown_names_and_missing_files() -> None:
    with pytest.raises(UsageError, match="did you mean 'starter'"):
        load_questions("startr")
    with pytest.raises(StorageError, match="there is no file"):
        load_questions("/nowhere/q.jsonl")
