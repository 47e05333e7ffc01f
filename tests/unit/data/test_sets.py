"""Sampling, merging, comparing and converting sets of conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import polars
import pytest

from chaccu.artifact import read_manifest, verify_files
from chaccu.conversation import Conversation
from chaccu.data.clean import clean_conversations
from chaccu.data.convert import convert_conversations
from chaccu.data.diff import compare_datasets
from chaccu.data.merge import merge_datasets
from chaccu.data.records import read_conversations
from chaccu.data.sample import sample_conversations
from chaccu.errors import DataError, StorageError, UsageError

from .conftest import share_record
from .talks import talk

Dump = Callable[..., Path]


def write(path: Path, conversations: Sequence[Conversation]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(conversation) + b"\n" for conversation in conversations))
    return path


def some(count: int, source: str = "S") -> list[Conversation]:
    return [
        msgspec.structs.replace(
            talk(f"question {number} of {source}", f"answer {number}", record_id=f"{source}{number}_0"),
            source=f"dump#{source}{number // 2}",
        )
        for number in range(count)
    ]


def ids(path: Path) -> list[str]:
    return [conversation.id for conversation in read_conversations(path)]


class TestSample:
    def test_exactly_the_count_the_same_for_the_seed_and_nested(self, tmp_path: Path) -> None:
        path = write(tmp_path / "all.jsonl", some(200))
        report = sample_conversations(path, tmp_path / "a.jsonl", count=20, seed=1)
        assert (report.read, report.taken) == (200, 20)
        sample_conversations(write(tmp_path / "back.jsonl", some(200)[::-1]), tmp_path / "b.jsonl", count=20, seed=1)
        sample_conversations(path, tmp_path / "c.jsonl", count=30, seed=1)
        sample_conversations(path, tmp_path / "d.jsonl", count=20, seed=2)
        a, b, c, d = (ids(tmp_path / f"{name}.jsonl") for name in "abcd")
        assert a == b[::-1]
        assert set(a) < set(c)
        assert set(a) != set(d)
        assert a == sorted(a, key=lambda name: int(name[1:-2]))

    def test_share_and_source(self, tmp_path: Path) -> None:
        path = write(tmp_path / "all.jsonl", some(1000))
        assert 60 < sample_conversations(path, tmp_path / "a.jsonl", share=0.1).taken < 140
        sample_conversations(path, tmp_path / "b.jsonl", count=10, by_source=True)
        taken = [conversation.source for conversation in read_conversations(tmp_path / "b.jsonl")]
        assert len(taken) == 20
        assert len(set(taken)) == 10
        assert sample_conversations(path, tmp_path / "c.jsonl", count=5000).taken == 1000

    def test_wrong_use_leaves_nothing(self, tmp_path: Path) -> None:
        path = write(tmp_path / "all.jsonl", some(3))
        for wrong in ({}, {"count": 1, "share": 0.5}, {"count": 0}, {"share": 0.0}, {"share": 1.1}):
            with pytest.raises(UsageError):
                sample_conversations(path, tmp_path / "out.jsonl", **wrong)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="none of 3"):
            sample_conversations(path, tmp_path / "out.jsonl", share=1e-9)
        (tmp_path / "empty").mkdir()
        with pytest.raises(StorageError, match="holds no"):
            sample_conversations(tmp_path / "empty", tmp_path / "out.jsonl", count=1)
        assert not (tmp_path / "out.jsonl").exists()


class TestMerge:
    def test_what_is_held_out_anywhere_is_held_out_and_twins_go(self, tmp_path: Path, write_dump: Dump) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        records = [share_record(number) for number in range(40)]
        clean_conversations([str(write_dump(records))], first, validation_share=0.3, seed=1)
        others = [share_record(number + 900) | {"id": f"Talk{number}_8"} for number in range(40)]
        clean_conversations([str(write_dump([*others, *records[:5]]))], second, validation_share=0.3, seed=2)
        report = merge_datasets([first, second], tmp_path / "all")
        assert (report.read, report.kept, report.duplicates) == (85, 80, 5)
        assert report.moved > 5
        sides = [
            {conversation.source.rpartition("#")[2] for conversation in read_conversations(tmp_path / "all" / name)}
            for name in ("train.jsonl", "validation.jsonl")
        ]
        assert not sides[0] & sides[1]
        manifest = read_manifest(tmp_path / "all", kind="dataset")
        verify_files(tmp_path / "all", manifest.files)
        assert set(manifest.parents) == {"dataset-1", "dataset-2"}
        ledger = polars.read_parquet(tmp_path / "all" / "ledger.parquet")
        assert ledger.height == report.duplicates + report.moved

    def test_files_are_training_and_wrong_use_is_told(self, tmp_path: Path) -> None:
        a, b = write(tmp_path / "a.jsonl", some(3, "A")), write(tmp_path / "b.jsonl", some(4, "B"))
        report = merge_datasets([a, b], tmp_path / "out")
        assert report.rows == {"train.jsonl": 7, "validation.jsonl": 0}
        assert ids(tmp_path / "out" / "train.jsonl") == ids(a) + ids(b)
        with pytest.raises(UsageError, match="only one"):
            merge_datasets([a], tmp_path / "out")
        with pytest.raises(UsageError, match="no dataset"):
            merge_datasets([a, b], a)


def test_diff_tells_what_is_shared_changed_and_on_one_side(tmp_path: Path) -> None:
    ours = some(6)
    changed = msgspec.structs.replace(ours[1], messages=talk("question 1 of S", "another answer").messages)
    theirs = [ours[0], changed, *ours[3:], *some(2, "T"), ours[5]]
    report = compare_datasets(write(tmp_path / "a.jsonl", ours), write(tmp_path / "b.jsonl", theirs))
    assert (report.same, report.changed, report.only_first, report.only_second) == (4, 1, 1, 3)
    assert (report.changed_ids, report.only_first_ids, report.only_second_ids) == (["S1_0"], ["S2_0"], ["S5_0", "T0_0", "T1_0"])
    assert not report.is_equal
    assert compare_datasets(tmp_path / "a.jsonl", tmp_path / "a.jsonl").is_equal


class TestConvert:
    CONVERSATIONS = (
        talk("naïve 🙂\r\n", " ```\n\tx\n``` ", system="Be kind.", record_id="A_0"),
        talk("مرحبا", "世界", "q", "", record_id="B_4"),
    )

    def test_there_and_back_by_every_form(self, tmp_path: Path) -> None:
        start = write(tmp_path / "start.jsonl", self.CONVERSATIONS)
        assert convert_conversations(str(start), tmp_path / "a.parquet") == 2
        convert_conversations(str(start), tmp_path / "b.jsonl", "sharegpt")
        convert_conversations(str(start), tmp_path / "c.jsonl", "openai")
        for name in ("a.parquet", "b.jsonl", "c.jsonl"):
            convert_conversations(str(tmp_path / name), tmp_path / "back.jsonl", "jsonl")
            back = list(read_conversations(tmp_path / "back.jsonl"))
            assert [(one.system, one.messages) for one in back] == [(one.system, one.messages) for one in self.CONVERSATIONS]
            if name != "c.jsonl":
                assert [one.id for one in back] == ["A_0", "B_4"]
        assert polars.read_parquet(tmp_path / "a.parquet").columns == ["id", "source", "system", "messages"]
        first = json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])
        assert list(first) == ["messages"]
        assert first["messages"][0] == {"role": "system", "content": "Be kind."}

    def test_what_is_no_conversation_stops_it(self, tmp_path: Path, write_dump: Dump) -> None:
        dump = write_dump([share_record(1), {"id": "x", "conversations": [{"from": "human", "value": "q"}]}])
        with pytest.raises(DataError, match=r"record 2 .*question without an answer"):
            convert_conversations(str(dump), tmp_path / "out.jsonl")
        dump.write_bytes(dump.read_bytes()[:-40])
        with pytest.raises(DataError, match="cut off"):
            convert_conversations(str(dump), tmp_path / "out.jsonl")
        with pytest.raises(UsageError, match="parket"):
            convert_conversations(str(dump), tmp_path / "out.jsonl", "parket")
        window = {"role": "assistant", "content": "and so on", "trained_from": 4}
        dump.write_text(
            json.dumps({"id": "w", "source": "d#w", "messages": [{"role": "user", "content": "Go on"}, window]}) + "\n"
        )
        with pytest.raises(DataError, match="window of a longer answer") as caught:
            convert_conversations(str(dump), tmp_path / "out.jsonl")
        assert "without a token limit" in (caught.value.remedy or "")
        assert not (tmp_path / "out.jsonl").exists()
