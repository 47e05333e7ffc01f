from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pytest

from chaccu.errors import DataError, StorageError
from chaccu.rank import read_battles


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("b.csv", "winner,model_b,extra,model_a\nmodel_a,y,1,x\ntie,z,2,y\n"),
        ("b.csv", "left,right,winner\nx,y,left\ny,z,tie (bothbad)\n"),
        (
            "b.jsonl",
            '{"model_a": "x", "model_b": "y", "winner": "model_a"}\n{"model_a": "y", "model_b": "z", "winner": "tie"}\n',
        ),
    ],
)
def test_files_of_all_shapes_hold_the_same_battles(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    battles = read_battles(tmp_path / name)
    assert (battles.models, battles.left.tolist(), battles.right.tolist(), battles.outcome.tolist()) == (
        ["x", "y", "z"],
        [0, 1],
        [1, 2],
        [0, 1],
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has the columns"),
        ("a,b\n1,2\n", "has the columns a, b"),
        ("model_a,model_b,winner\n", "holds no battle"),
        ("model_a,model_b,winner\nx,y,tie\nx,y,both\n", "battle 2 of .* has the winner 'both'"),
        ("model_a,model_b,winner\nx,y,\n", "no winner in 1 rows"),
        ("model_a,model_b,winner,question_id\nx,y,tie,\n", "battle 1 of .* has nothing in the column 'question_id'"),
        ('model_a,model_b,winner,question_id\nx,y,tie," "\n', "battle 1 of .* has nothing in the column 'question_id'"),
        ("model_a,model_b,winner\nx,x,tie\n", "sets x against itself"),
        ("model_a,model_b,winner\nx,,tie\n", "names no model"),
    ],
)
def test_wrong_files_are_refused_with_the_row(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        read_battles(tmp_path / "b.csv")


def test_a_column_of_objects_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"model_a": {"name": "x"}, "model_b": "y", "winner": "tie"}\n')
    with pytest.raises(DataError, match=r"the column 'model_a' of .* holds lists or objects"):
        read_battles(tmp_path / "b.jsonl")


def test_line_ends_blanks_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes("\ufeffmodel_a,model_b,winner,question_id\r\né, y ,model_a, 1\r\ny,é,tie ,1\r\n".encode())
    (tmp_path / "b.jsonl").write_bytes(
        '{"model_a": "é", "model_b": " y", "winner": "model_a", "question_id": 1}\r\n\r\n'
        '{"model_a": "y", "model_b": "é", "winner": "tie", "question_id": "1"}'.encode()
    )
    for name in ("b.csv", "b.jsonl"):
        battles = read_battles(tmp_path / name)
        assert (battles.models, battles.outcome.tolist()) == (["é", "y"], [0, 1])
        assert battles.question is not None
        assert battles.question.tolist() == [0, 0]


def test_broken_json_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"model_a": "x", "model_b"')
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_battles(tmp_path / "b.jsonl")
    with pytest.raises(StorageError, match="there is no file"):
        read_battles(tmp_path / "none.csv")


def write_forms(folder: Path) -> list[Path]:
    frame = pl.DataFrame(
        {
            "model_a": ["x", "y"],
            "model_b": ["y", "z"],
            "winner": ["model_a", "both_bad"],
            "question_id": ["81", "q"],
            "turn": [1, 2],
        }
    )
    frame.write_csv(folder / "b.csv")
    frame.write_ndjson(folder / "b.jsonl")
    frame.write_json(folder / "b.json")
    frame.write_parquet(folder / "b.parquet")
    for name in ("b.csv", "b.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    return sorted(folder.iterdir())


def test_all_forms_hold_the_same_battles(tmp_path: Path) -> None:
    files = write_forms(tmp_path)
    assert len(files) == 6
    for file in files:
        battles = read_battles(file)
        assert (battles.models, battles.outcome.tolist(), battles.both_bad) == (["x", "y", "z"], [0, 1], 1)
        assert battles.question is not None
        assert battles.question.tolist() == [0, 1]
    together = read_battles(*files)
    assert (len(together), together.models) == (12, ["x", "y", "z"])
    assert together.question is not None
    assert together.question.tolist() == [0, 1] * 6


def test_questions_come_from_the_column_that_is_named_or_from_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("model_a,model_b,winner,id\nx,y,tie,7\nx,y,tie,7\n")
    (tmp_path / "b.csv").write_text("model_a,model_b,winner,question_id\nx,y,tie,1\n")
    named = read_battles(tmp_path / "a.csv", question_column="id").question
    assert named is not None
    assert named.tolist() == [0, 0]
    assert read_battles(tmp_path / "a.csv", tmp_path / "b.csv").question is None
    with pytest.raises(DataError, match="has no column 'id'"):
        read_battles(tmp_path / "a.csv", tmp_path / "b.csv", question_column="id")


def test_rows_without_a_winner_are_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(
        '{"model_a": "x", "model_b": "y", "winner": null}\n{"model_a": "x", "model_b": "y", "winner": "tie"}\n'
    )
    battles = read_battles(tmp_path / "b.jsonl")
    assert (len(battles), battles.unread) == (1, 1)


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"model_a,model_b,winner\nx,y,tie\n" * 99)[:-9])
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_battles(tmp_path / "b.csv.gz")
