from __future__ import annotations

import codecs
import json
from collections import Counter
from pathlib import Path

import pytest

from chaccu.errors import DataError, StorageError, UsageError
from chaccu.judge.questions import load_question_sets, load_questions

SHARED = Path(__file__).parents[3].parent / "shared" / "data"


def shared(name: str) -> str:
    if not (SHARED / name).is_file():
        pytest.skip(f"there is no {SHARED / name}")
    return str(SHARED / name)


def write(file: Path, *lines: object) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_mt_bench_with_its_reference_answers() -> None:
    file, references = shared("mt_bench/question.jsonl"), shared("mt_bench/reference_answer_gpt-4.jsonl")
    questions = load_questions(f"mt-bench:{file},{references}")
    assert len(questions) == 80
    assert all(len(one.turns) == 2 for one in questions)
    by_category = {one.category: one.temperature for one in questions}
    assert by_category == {
        "writing": 0.7,
        "roleplay": 0.7,
        "reasoning": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "extraction": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
    }
    with_reference = Counter(one.category for one in questions if one.reference)
    assert with_reference >= Counter({"math": 10, "reasoning": 10, "coding": 10})


def test_vicuna_bench_in_both_of_its_files() -> None:
    file = shared("mt_bench/vicuna_bench_question.jsonl")
    references = shared("mt_bench/vicuna_bench_reference_answer_gpt-4.jsonl")
    questions = load_questions(f"vicuna-bench:{file},{references}")
    first = load_questions(shared("vicuna_blog/questions.jsonl"))
    assert [(one.question_id, one.category) for one in questions] == [(one.question_id, one.category) for one in first]
    assert Counter(one.category for one in questions if one.reference) == {"coding": 7, "math": 3}


def test_alpaca_eval_by_content_and_by_name(tmp_path: Path) -> None:
    entries = [
        {"instruction": "Say hi.", "output": "Hi.", "generator": "other", "dataset": "koala"},
        {"instruction": "Say no.", "output": "No.", "generator": "other"},
    ]
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(entries, indent=1))
    questions = load_questions(str(file))
    assert questions == load_questions(f"alpaca-eval:{file}")
    assert [(one.question_id, one.category, one.turns, one.reference) for one in questions] == [
        ("alpaca-eval-1", "koala", ("Say hi.",), None),
        ("alpaca-eval-2", "alpaca-eval", ("Say no.",), None),
    ]


@pytest.mark.parametrize(
    ("line", "category"),
    [
        ({"question_id": "a1", "cluster": "SQL", "category": "arena-hard", "turns": [{"content": "Why?"}]}, "SQL"),
        ({"uid": "a1", "category": "arena-hard-v0.1", "cluster": "SQL", "prompt": "Why?"}, "SQL"),
        ({"uid": "a1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Why?"}, "hard_prompt"),
        ({"uid": "a1", "category": None, "cluster": None, "prompt": "Why?", "turns": None}, "arena-hard"),
    ],
)
def test_arena_hard_in_its_forms(tmp_path: Path, line: dict[str, object], category: str) -> None:
    (question,) = load_questions(str(write(tmp_path / "q.jsonl", line)))
    assert (question.question_id, question.category, question.turns) == ("a1", category, ("Why?",))


def test_arena_hard_with_turns_of_plain_text(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", {"question_id": "a1", "category": "arena-bench-v1", "turns": ["Why?"]})
    assert load_questions(f"arena-hard:{file}") == load_questions(str(file))


def test_alpaca_farm_keeps_what_an_instruction_is_about(tmp_path: Path) -> None:
    entries = [
        {"instruction": "Sum it up.", "input": "A long text.", "output": "A text.", "dataset": None},
        {"instruction": "Say hi.", "input": ""},
    ]
    (tmp_path / "eval.json").write_text(json.dumps(entries))
    questions = load_questions(str(tmp_path / "eval.json"))
    assert [(one.category, one.turns) for one in questions] == [
        ("alpaca-eval", ("Sum it up.\n\nA long text.",)),
        ("alpaca-eval", ("Say hi.",)),
    ]


@pytest.mark.parametrize("form", ["plain", "mt-bench", "arena-hard", "alpaca-eval"])
def test_files_of_other_systems_have_a_mark_at_the_front_and_longer_line_ends(tmp_path: Path, form: str) -> None:
    lines = {
        "plain": '{"question_id": 1, "text": "Why?"}\r\n\r\n{"question_id": 2, "text": "Wo ist Zürich?"}\r\n',
        "mt-bench": '{"question_id": 1, "turns": ["Why?"]}\r\n{"question_id": 2, "turns": ["Wo ist Zürich?"]}',
        "arena-hard": '{"uid": "1", "prompt": "Why?"}\r\n{"uid": "2", "prompt": "Wo ist Zürich?"}\r\n',
        "alpaca-eval": '[{"instruction": "Why?"},\r\n{"instruction": "Wo ist Zürich?"}]\r\n',
    }
    file = tmp_path / "q.jsonl"
    file.write_bytes(codecs.BOM_UTF8 + lines[form].encode())
    for source in (str(file), f"{form}:{file}"):
        assert [one.turns for one in load_questions(source)] == [("Why?",), ("Wo ist Zürich?",)]
    references = tmp_path / "r.jsonl"
    references.write_bytes(codecs.BOM_UTF8 + b'{"question_id": 1, "choices": [{"index": 0, "turns": ["So."]}]}\r\n')
    if form in ("plain", "mt-bench"):
        assert [one.reference for one in load_questions(f"{form}:{file},{references}")] == [("So.",), None]


def test_null_says_as_much_as_nothing(tmp_path: Path) -> None:
    names = ("category", "text", "reference", "temperature", "checks", "criteria")
    nulls = {"question_id": 1, "turns": ["Why?"]} | dict.fromkeys(names)
    empty = {"question_id": 2, "text": "Why?", "turns": None, "reference": []}
    blank = {"question_id": 3, "text": "Why?", "reference": ""}
    for one in load_questions(str(write(tmp_path / "q.jsonl", nulls, empty, blank))):
        assert (one.category, one.turns, one.reference, one.temperature, one.checks) == ("generic", ("Why?",), None, 0.7, ())


def test_a_plain_file_with_all_that_it_may_say(tmp_path: Path) -> None:
    line = {
        "question_id": 1,
        "category": "writing",
        "turns": ["One?", "Two?"],
        "reference": ["1", "2"],
        "temperature": 0.2,
        "checks": [{"kind": "number", "value": 2, "turn": 1}],
    }
    single = {"question_id": 2, "text": "Three?", "reference": "3"}
    first, second = load_questions(f"plain:{write(tmp_path / 'q.jsonl', line, single)}")
    assert (first.reference, first.temperature, first.checks[0].turn) == (("1", "2"), 0.2, 1)
    assert (second.reference, second.temperature, second.checks) == (("3",), 0.7, ())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question_id": 1, "text": "?", "reference": ["a", "b"]}, "1 turns and 2 reference answers"),
        ({"question_id": 1, "text": "?", "checks": [{"kind": "rhyme"}]}, "line 1 .* is no question: Invalid value 'rhyme'"),
        ({"question_id": 1, "text": "?", "checks": [{"kind": "lines", "count": 1, "turn": 1}]}, "is for turn 1"),
        (
            {"question_id": 1, "text": "?", "checks": [{"kind": "pattern", "pattern": "("}]},
            "line 1 .* is no regular expression",
        ),
        ({"uid": "a"}, "question a asks nothing"),
        ({"uid": "a", "turns": []}, "question a asks nothing"),
        ({"turns": [{"content": "?"}]}, "neither a uid nor a question_id"),
    ],
)
def test_faults_of_a_line_are_named(tmp_path: Path, line: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_questions(str(write(tmp_path / "q.jsonl", line)))


def test_faults_of_forms_and_references_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", {"question_id": 1, "text": "?"})
    with pytest.raises(UsageError, match="did you mean 'mt-bench'"):
        load_questions(f"mtbench:{file}")
    with pytest.raises(StorageError, match="there is no file"):
        load_questions(f"mt-bench:{file}x.jsonl")
    others = write(tmp_path / "r.jsonl", {"question_id": 7, "choices": [{"turns": ["a"]}]})
    with pytest.raises(DataError, match=r"answers to 1 questions .* question 7 the first"):
        load_questions(f"mt-bench:{file},{others}")
    several = write(tmp_path / "s.jsonl", {"question_id": 1, "choices": []})
    with pytest.raises(DataError, match="0 choices, not one"):
        load_questions(f"mt-bench:{file},{several}")
    twice = {"question_id": 1, "choices": [{"turns": ["a"]}]}
    with pytest.raises(DataError, match=r"line 2 .* is a second answer to question 1"):
        load_questions(f"mt-bench:{file},{write(tmp_path / 't.jsonl', twice, twice)}")
    (tmp_path / "latin.jsonl").write_bytes('{"question_id": 1, "text": "Zürich?"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"line 1 .* is no question"):
        load_questions(str(tmp_path / "latin.jsonl"))
    (tmp_path / "a.json").write_text('[{"output": "?"}]')
    with pytest.raises(DataError, match="no file of AlpacaEval"):
        load_questions(str(tmp_path / "a.json"))


def test_a_path_with_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my:q.jsonl", {"question_id": 1, "text": "?"})
    monkeypatch.chdir(tmp_path)
    assert len(load_questions("my:q.jsonl")) == 1


def test_several_sets_are_one_after_the_other(tmp_path: Path) -> None:
    file = str(write(tmp_path / "q.jsonl", {"question_id": "mine", "text": "?"}))
    assert [one.question_id for one in load_question_sets([file, "starter", file])] == ["mine", *range(1, 13)]
    with pytest.raises(UsageError, match=r"q\.jsonl and starter both have a question 1"):
        load_question_sets(["starter", str(write(tmp_path / "q.jsonl", {"question_id": 1, "text": "?"}))])
