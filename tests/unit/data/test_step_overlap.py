from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars
import pytest

from chaccu.data.clean import clean_conversations
from chaccu.data.config import load_config
from chaccu.data.outcome import Drop, Joined, Trimmed
from chaccu.data.records import Draft, Turn, read_conversations, source_of
from chaccu.data.steps.overlap import Overlap
from chaccu.data.steps.record_marks import RecordMarks

Dump = Callable[..., Path]


def part(record_id: str, texts: str, first: str = "human") -> Draft:
    """A part whose turns are the letters of `texts`; small letters are questions."""
    turns = tuple(Turn("human" if text.islower() else "gpt", text) for text in texts)
    return Draft(id=record_id, source=f"dump#{source_of(record_id)}", turns=turns)


def said(outcome: Any) -> str:
    draft = outcome.draft if isinstance(outcome, Trimmed) else outcome
    return "".join(turn.text for turn in draft.turns)


class TestMerge:
    def test_parts_that_repeat_an_answer_become_one(self) -> None:
        joined = Overlap().join_parts([part("A_0", "aAbB"), part("A_3", "BcC"), part("A_6", "dD"), part("B_0", "aA")])
        assert said(joined[0]) == "aAbBcCdD"
        assert joined[1] == Joined("joined to the part before it", 2, 0)
        assert joined[2] == Joined("joined to the part before it", 2, 0)
        assert said(joined[3]) == "aA"

    def test_a_question_and_its_answer_in_two_parts_meet(self) -> None:
        joined = Overlap().join_parts([part("A_0", "aAb"), part("A_3", "BcC")])
        assert said(joined[0]) == "aAbBcC"

    def test_a_part_that_adds_nothing_is_a_drop(self) -> None:
        joined = Overlap().join_parts([part("A_0", "aAbB"), part("A_2", "bB"), part("A_0", "aA"), part("A_4", "cC")])
        assert isinstance(joined[1], Drop)
        # A number that goes back begins anew.
        assert [said(joined[0]), said(joined[2])] == ["aAbB", "aA"]

    def test_the_same_part_twice_with_more_the_second_time(self) -> None:
        joined = Overlap().join_parts([part("A_0", "aA"), part("A_0", "aAbB")])
        assert said(joined[0]) == "aAbB"
        assert isinstance(joined[1], Joined)

    def test_turns_that_differ_or_are_missing_begin_anew(self) -> None:
        different = [part("A_0", "aAbB"), part("A_3", "XcC"), part("A_9", "dD")]
        assert Overlap().join_parts(different) == different

    def test_numbers_that_count_parts_are_told_by_what_is_repeated(self) -> None:
        joined = Overlap().join_parts([part("A_0", "aAbBcC"), part("A_1", "CdD"), part("A_2", "eE")])
        assert said(joined[0]) == "aAbBcCdD"
        assert said(joined[2]) == "eE"

    def test_empty_parts_between_are_passed_over_and_other_sources_are_not(self) -> None:
        joined = Overlap().join_parts([part("A_0", "aA"), part("A_2", ""), part("A_1", "AbB")])
        assert said(joined[0]) == "aAbB"
        apart = [part("A_0", "aA"), part("other", "xX"), part("A_1", "AbB")]
        assert Overlap().join_parts(apart) == apart


def test_cut_keeps_parts_apart_without_what_they_repeat() -> None:
    outcomes = Overlap(parts="cut").join_parts([part("A_0", "aAbB"), part("A_3", "BcC"), part("A_6", "dD")])
    assert [said(outcome) for outcome in outcomes] == ["aAbB", "cC", "dD"]
    assert isinstance(outcomes[1], Trimmed)


def test_marked_records() -> None:
    step = RecordMarks(drop=("plugins", "toxic"))
    assert step.judge_record({"plugins": ["web"]}) == Drop("marked plugins")
    assert step.judge_record({"plugins": [], "toxic": True}) == Drop("marked toxic")
    for value in ({"plugins": None}, {}, [], 7, None):
        assert step.judge_record(value) is None


def turns_of(number: int, begin: int, end: int) -> list[dict[str, str]]:
    """Turns `begin` to `end` of conversation `number`, each some thousand characters long and like no other."""
    kinds = ("human", "gpt")
    return [
        {"from": kinds[at % 2], "value": " ".join(f"talk{number}-turn{at}-word{place}" for place in range(60))}
        for at in range(begin, end)
    ]


@pytest.fixture
def dump(write_dump: Dump) -> Path:
    """Conversations of twelve turns in parts that repeat an answer, some of which are in several chunks' reach."""
    records: list[Any] = []
    for number in range(130):
        for begin, end in ((0, 6), (5, 10), (9, 12)):
            records.append({"id": f"Talk{number}_{begin}", "conversations": turns_of(number, begin, end)})
        records.append({"id": f"Talk{number}_11", "conversations": turns_of(number, 11, 12)})
    return write_dump([*records, 7, {"id": "P_0", "plugins": ["web"], "conversations": turns_of(999, 0, 4)}])


def test_a_dump_of_parts_comes_back_whole_and_its_books_balance(tmp_path: Path, dump: Path) -> None:
    report = clean_conversations([str(dump)], tmp_path / "out", validation_share=0)
    assert (report.read, report.kept, report.rows["train.jsonl"]) == (522, 390, 130)
    assert report.dropped == {
        "read": {"record is no object": 1},
        "record_marks": {"marked plugins": 1},
        "overlap": {"holds nothing but turns of earlier parts": 130},
    }
    assert report.changed == {"overlap": {"joined to the part before it": 260}}
    for number, conversation in enumerate(read_conversations(tmp_path / "out" / "train.jsonl")):
        assert [message.content for message in conversation.messages] == [turn["value"] for turn in turns_of(number, 0, 12)]
    ledger = polars.read_parquet(tmp_path / "out" / "ledger.parquet")
    assert ledger.filter(polars.col("id") == "P_0")["reason"].to_list() == ["marked plugins"]
    row = ledger.row(by_predicate=polars.col("id") == "Talk0_5", named=True)
    repeated = len(turns_of(0, 5, 6)[0]["value"])
    assert row["before_chars"] - row["after_chars"] == repeated


def test_parts_are_joined_across_chunks_with_any_number_of_workers(tmp_path: Path, dump: Path) -> None:
    assert dump.stat().st_size > 2 << 20
    outputs = []
    for workers in (1, 2):
        clean_conversations([str(dump)], tmp_path / "out", workers=workers, fresh=True)
        outputs.append({file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()})
    assert outputs[0] == outputs[1]


def test_joined_records_share_the_fate_of_their_leader(tmp_path: Path, write_dump: Dump) -> None:
    parts = [
        {"id": f"{name}_{begin}", "conversations": turns_of(1, begin, end)}
        for name in ("First", "Second")
        for begin, end in ((0, 4), (3, 8))
    ]
    report = clean_conversations([str(write_dump(parts))], tmp_path / "out", validation_share=0)
    assert (report.read, report.kept) == (4, 2)
    assert report.dropped == {"exact_duplicates": {"exact duplicate": 2}}
    ledger = polars.read_parquet(tmp_path / "out" / "ledger.parquet").filter(polars.col("action") == "dropped")
    assert ledger["id"].to_list() == ["Second_0", "Second_3"]
    assert ledger["before_chars"].sum() == 2 * ledger["before_chars"][0] or ledger["before_chars"].min() > 0


def test_cut_loses_no_turn_either(tmp_path: Path, dump: Path) -> None:
    config = tmp_path / "clean.yaml"
    config.write_text("steps: [record_marks, {overlap: {parts: cut}}, roles]")
    report = clean_conversations([str(dump)], tmp_path / "out", load_config(config), validation_share=0)
    assert report.kept == 390
    texts = [m.content for c in read_conversations(tmp_path / "out" / "train.jsonl") for m in c.messages]
    assert texts == [turn["value"] for number in range(130) for turn in turns_of(number, 0, 12)]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["steps"][1] == {"overlap": {"parts": "cut"}}
