"""Each kind of dump comes out as its turns; and nothing, whatever its shape, makes a reader raise."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import polars
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaccu.data.clean import clean_conversations
from chaccu.data.config import load_config
from chaccu.data.intake import Intake
from chaccu.data.judging import judge_chunk
from chaccu.data.outcome import Drop
from chaccu.data.readers import list_readers, load_reader, recognise_reader, regroup_records
from chaccu.data.records import Draft, RawRecord
from chaccu.data.sources import find_sources
from chaccu.errors import UsageError

ORIGIN = "dump"


def reply(role: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A message of a nested OpenAssistant tree."""
    return {"role": role, "text": text, "replies": list(replies), **more}


TREE = {
    "message_tree_id": "t1",
    "prompt": reply(
        "prompter",
        "Why is the sky blue?",
        reply("assistant", "Refused.", rank=0, review_result=False),
        reply("assistant", "Because.", rank=2),
        reply("assistant", "Air scatters blue light.", reply("prompter", "Thanks!", reply("assistant", "Gladly.")), rank=1),
        reply("assistant", "Deleted.", rank=0, deleted=True),
        reply("assistant", "Unranked."),
    ),
}
ROWS = [
    {"message_tree_id": "t2", "message_id": "m1", "parent_id": None, "text": "Hello", "role": "prompter"},
    {"message_tree_id": "t2", "message_id": "m2", "parent_id": "m1", "text": "Worse", "role": "assistant", "rank": 1},
    {"message_tree_id": "t2", "message_id": "m3", "parent_id": "m1", "text": "Better", "role": "assistant", "rank": 0},
    {"message_tree_id": "t3", "message_id": "m4", "parent_id": "gone", "text": "Orphan", "role": "assistant"},
]


def node(parent: str | None, role: str, *parts: Any, kind: str = "text", **metadata: Any) -> dict[str, Any]:
    """A node of a ChatGPT export."""
    content = {"content_type": kind, "parts": list(parts)}
    return {"parent": parent, "message": {"author": {"role": role}, "content": content, "metadata": metadata}}


EXPORT = {
    "conversation_id": "c1",
    "title": "Rivers",
    "current_node": "a3",
    "mapping": {
        "root": {"parent": None, "message": None},
        "s": node("root", "system", ""),
        "h": node("s", "user", "my profile", is_visually_hidden_from_conversation=True),
        "q1": node("h", "user", "Name a river."),
        "a1": node("q1", "assistant", "The Loa."),
        "a2": node("q1", "assistant", "The Ma", finish_details={"type": "max_tokens"}),
        "r2": node("a2", "assistant", "hm", kind="thoughts"),
        "a2b": node("r2", "assistant", "ipo."),
        "q2": node("a2b", "user", "And a lake?"),
        "a3": node("q2", "assistant", "Poopó."),
        "q3": node("a2b", "user", {"asset_pointer": "file"}, "What is this?", kind="multimodal_text"),
        "a4": node("q3", "assistant", "A map."),
    },
}

# For each reader a record, its id, and its turns.
EXAMPLES: list[tuple[str, dict[str, Any], str, list[tuple[str, str | None]]]] = [
    (
        "sharegpt",
        {"id": "x_0", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        "x_0",
        [("human", "Q"), ("gpt", "A")],
    ),
    (
        "chaccu",
        {"id": "y", "source": "s#y", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None}]},
        "y",
        [("user", "Q"), ("assistant", None)],
    ),
    (
        "openai",
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "here?"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": '{"place": "La Paz"}'}}],
                },
                {"role": "tool", "content": "14 °C", "tool_call_id": "1"},
                {"role": "assistant", "content": "Cool."},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            ]
        },
        "record-7",
        [
            ("developer", "Be brief."),
            ("user", "Weather here?"),
            ("assistant", '{"name":"weather","arguments":{"place":"La Paz"}}'),
            ("tool", "14 °C"),
            ("assistant", "Cool."),
            ("user", None),
        ],
    ),
    (
        "gateway",
        {
            "id": "chatcmpl-1",
            "time": "2025-06-01T12:00:00.000Z",
            "model": "tuned",
            "finish_reason": "stop",
            "system": "Be brief.",
            "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "user": "someone",
        },
        "chatcmpl-1",
        [("user", "Q"), ("assistant", "A")],
    ),
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        "record-7",
        [("user", "Add.\n\n1 2"), ("assistant", "3")],
    ),
    ("alpaca", {"id": 5, "instruction": "Add.", "context": "", "response": "3"}, "5", [("user", "Add."), ("assistant", "3")]),
    (
        "lmsys",
        {"conversation_hash": "h", "conversation": [{"role": "user", "content": "Q", "toxic": False}], "model": "m"},
        "h",
        [("user", "Q")],
    ),
    (
        "oasst",
        TREE,
        "t1",
        [
            ("prompter", "Why is the sky blue?"),
            ("assistant", "Air scatters blue light."),
            ("prompter", "Thanks!"),
            ("assistant", "Gladly."),
        ],
    ),
    (
        "chatgpt",
        EXPORT,
        "c1",
        [("user", "Name a river."), ("assistant", "The Maipo."), ("user", "And a lake?"), ("assistant", "Poopó.")],
    ),
]


def raw(*values: Any) -> list[RawRecord]:
    """Records as they stand in a file."""
    return [RawRecord(number, json.dumps(value).encode(), 0, 0) for number, value in enumerate(values, start=1)]


def read_all(*arguments: str, reader: str = "auto") -> list[Draft | Drop]:
    """What the readers make of whole sources."""
    return [
        load_reader(chunk.reader).parse(msgspec.json.decode(record.payload), record.number, chunk.origin)
        for chunk in Intake(find_sources(arguments), reader)
        for record in chunk.records
    ]


def turns_of(draft: Draft | Drop) -> list[tuple[str, str | None]]:
    assert isinstance(draft, Draft), draft
    return [(turn.role, turn.text) for turn in draft.turns]


@pytest.mark.parametrize(("name", "record", "record_id", "turns"), EXAMPLES)
def test_a_record_is_recognised_and_read(
    name: str, record: dict[str, Any], record_id: str, turns: list[tuple[str, str | None]]
) -> None:
    assert recognise_reader(record) == name
    draft = load_reader(name).parse(record, 7, ORIGIN)
    assert isinstance(draft, Draft)
    assert draft.id == record_id
    assert turns_of(draft) == turns
    known = load_reader(name).COLUMNS
    projected = {key: value for key, value in record.items() if key in known}
    assert load_reader(name).parse(projected, 7, ORIGIN) == draft, "COLUMNS lacks a key"


def test_every_reader_has_an_example() -> None:
    assert {name for name, *_ in EXAMPLES} == set(list_readers())


def test_an_unknown_reader_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="sharegtp") as caught:
        load_reader("sharegtp")
    assert "sharegpt" in caught.value.remedy


def test_other_branches_are_forks_of_the_same_source() -> None:
    records = list(regroup_records("chatgpt", raw(EXPORT, {"no": "tree"})))
    drafts = [load_reader("chatgpt").parse(json.loads(record.payload), record.number, ORIGIN) for record in records]
    assert isinstance(drafts[-1], Drop)
    found = [draft for draft in drafts if isinstance(draft, Draft)]
    assert [draft.id for draft in found] == ["c1", "c1_1", "c1_2"]
    assert {draft.source for draft in found} == {"dump#c1"}
    assert turns_of(found[1]) == [("user", "Name a river."), ("assistant", "The Loa.")]
    assert turns_of(found[2])[2:] == [("user", None), ("assistant", "A map.")]


def test_a_tree_that_bites_its_tail_ends() -> None:
    loop = {"id": "l", "mapping": {"a": node("b", "user", "Q"), "b": node("a", "assistant", "A")}}
    assert isinstance(load_reader("chatgpt").parse(loop, 1, ORIGIN), Draft)
    same = [{"message_tree_id": "t", "message_id": "m", "parent_id": parent, "text": "x"} for parent in (None, "m", "m")]
    draft = load_reader("oasst").parse({"message_tree_id": "t", "rows": same}, 1, ORIGIN)
    assert len(turns_of(draft)) <= 3


def test_rows_of_a_tree_become_one_record() -> None:
    records = list(regroup_records("oasst", raw(ROWS[0], *ROWS[1:3], TREE, {"odd": 1}, ROWS[3])))
    assert [record.number for record in records] == [1, 4, 5, 6]
    drafts = [load_reader("oasst").parse(json.loads(record.payload), record.number, ORIGIN) for record in records]
    assert turns_of(drafts[0]) == [("prompter", "Hello"), ("assistant", "Better")]
    assert isinstance(drafts[1], Draft)
    assert drafts[2:] == [Drop("record has no tree of messages"), Drop("tree without its first message")]


def test_a_cleaned_file_of_rows_counts_trees(tmp_path: Path) -> None:
    lines = tmp_path / "oasst.jsonl"
    long = " ".join(f"word{number}" for number in range(30))
    rows = [{**row, "text": f"{row['text']} {long} {row['message_id']}"} for row in ROWS]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = clean_conversations([str(lines)], tmp_path / "out", validation_share=0)
    assert (report.read, report.kept) == (2, 1)
    assert report.dropped["read"] == {"tree without its first message": 1}


# --- sources ---


@pytest.mark.parametrize("preferred", [True, False])
def test_members_of_a_zip_are_read_where_they_lie(tmp_path: Path, preferred: bool) -> None:
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("user.json", json.dumps({"id": "u", "messages": []}))
        archive.writestr("chat.html", "<html>")
        archive.writestr("a/conversations.json" if preferred else "a/talks.json", json.dumps([EXPORT]))
    sources = find_sources([str(path)])
    names = ["a/conversations.json"] if preferred else ["a/talks.json", "user.json"]
    assert [source.origin for source in sources] == [f"{path}:{name}" for name in names]
    drafts = read_all(str(path))
    assert turns_of(drafts[0])[-1] == ("assistant", "Poopó.")
    assert len(drafts) == 3 if preferred else 4


def test_a_damaged_member_is_salvaged_and_told(tmp_path: Path) -> None:
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("talks.json", json.dumps([{"id": str(n), "conversations": []} for n in range(1000)], indent=1))
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"999"', b'"99X"'))
    intake = Intake(find_sources([str(path)]), "auto")
    assert 0 < sum(len(chunk.records) for chunk in intake) < 1000
    (cut,) = intake.cuts
    assert "CRC" in cut.cut.why
    assert cut.origin == f"{path}:talks.json"


TALKS = [{"conversation_id": f"c{n}", "conversation": [{"content": f"Q{n} 🦙", "role": "user"}]} for n in range(3000)]


def write_parquet(path: Path) -> Path:
    frame = polars.DataFrame([{**talk, "picture": b"\xff\x00", "when": None} for talk in TALKS])
    frame.write_parquet(path, row_group_size=500, compression="uncompressed")
    return path


def test_a_table_is_read_row_by_row_in_order(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet")
    seen: list[int] = []
    chunks = list(Intake(find_sources([str(path)]), "auto", lambda progress: seen.append(progress.bytes_read)))
    rows = [msgspec.json.decode(record.payload) for chunk in chunks for record in chunk.records]
    assert rows == TALKS
    assert {chunk.reader for chunk in chunks} == {"lmsys"}
    assert seen == sorted(seen)
    assert seen[-1] == path.stat().st_size


def test_flat_rows_in_a_table_become_trees(tmp_path: Path) -> None:
    polars.DataFrame(ROWS[:3]).write_parquet(tmp_path / "rows.parquet")
    (draft,) = read_all(str(tmp_path / "rows.parquet"))
    assert turns_of(draft) == [("prompter", "Hello"), ("assistant", "Better")]


def test_a_damaged_row_group_ends_the_table_with_a_message(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "bad.parquet")
    data = bytearray(path.read_bytes())
    begin = data.index(b"Q2600")
    data[begin - 3000 : begin + 3000] = b"\xff" * 6000
    path.write_bytes(data)
    intake = Intake(find_sources([str(path)]), "auto")
    count = sum(len(chunk.records) for chunk in intake)
    (cut,) = intake.cuts
    assert 0 < count < len(TALKS)
    assert cut.cut.after_record == count


# --- whatever comes ---

TEXTS = st.text(max_size=6) | st.sampled_from(["\ud800", "a\udfff", "user", "m1", "m2", "text", "t1"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.none().map(lambda _: 10**5000)
INNER_KEYS = [
    "from",
    "value",
    "content",
    "role",
    "rows",
    "fork",
    "author",
    "parts",
    "message",
    "parent",
    "metadata",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "finish_details",
    "type",
    "content_type",
    "m1",
    "m2",
]
KEYS = st.sampled_from(sorted(frozenset(INNER_KEYS).union(*(load_reader(name).COLUMNS for name in list_readers()))))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=30
)


def check_survives(name: str, value: Any) -> None:
    reader = load_reader(name)
    assert isinstance(reader.recognises(value), bool)
    found = reader.parse(value, 3, ORIGIN)
    assert isinstance(found, (Draft, Drop))
    if isinstance(found, Draft):
        assert isinstance(found.id, str)
        assert all(isinstance(turn.role, str) and isinstance(turn.text, (str, type(None))) for turn in found.turns)


@pytest.mark.parametrize("name", list_readers())
@given(VALUES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_value_makes_a_reader_raise(name: str, value: Any) -> None:
    check_survives(name, value)


def spoil(value: Any) -> list[Any]:
    """`value` with each part of it, one at a time, replaced by something of another type."""
    wrong: list[Any] = [None, True, 3, 2.5, "\ud800", [], {}, [[]], {"a": {}}, [None, 1], 10**5000]
    if isinstance(value, dict):
        inner = [{**value, key: bad} for key, part in value.items() for bad in spoil(part)]
        return wrong + inner + [{other: part for other, part in value.items() if other != key} for key in value]
    if isinstance(value, list):
        return wrong + [[*value[:place], bad, *value[place + 1 :]] for place, part in enumerate(value) for bad in spoil(part)]
    return wrong


@pytest.mark.parametrize(("name", "record"), [(name, record) for name, record, *_ in EXAMPLES])
def test_wrong_types_everywhere(name: str, record: dict[str, Any]) -> None:
    for spoilt in spoil(record):
        check_survives(name, spoilt)


def write_value(value: Any) -> bytes:
    """JSON where there is such, else rubbish."""
    try:
        return json.dumps(value).encode()
    except ValueError:
        return b"{"


@pytest.mark.parametrize("name", list_readers())
@given(st.lists(st.binary(max_size=60) | VALUES.map(write_value)))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_regrouping_loses_no_rubbish(name: str, payloads: list[bytes]) -> None:
    records = [RawRecord(number, payload, 0, 0) for number, payload in enumerate(payloads, start=1)]
    assert {record.number for record in regroup_records(name, records)} >= {
        record.number for record in records if b"message_tree_id" not in record.payload
    }


@pytest.mark.parametrize("name", list_readers())
@pytest.mark.parametrize("depth", [100, 900, 5000])
def test_deep_nesting_costs_its_record_alone(tmp_path: Path, name: str, depth: int) -> None:
    whole = next(record for reader, record, *_ in EXAMPLES if reader == name)
    deep = b'{"prompt": {"role": "x", "text": "y", "replies": ' + b"[" * depth + b"]" * depth + b"}}"
    tree = b'{"mapping": {"a": {"message": ' + b'{"a":' * depth + b"1" + b"}" * depth + b'}, "b": {"parent": 1}}}'
    path = tmp_path / "deep.jsonl"
    path.write_bytes(b"\n".join([json.dumps(whole).encode(), deep, tree, json.dumps(whole).encode(), b""]))
    chunks = list(Intake(find_sources([str(path)]), name))
    assert {record.number for chunk in chunks for record in chunk.records} == {1, 2, 3, 4}
    for chunk in chunks:
        assert len(judge_chunk(load_config(), chunk)) == len(chunk.records)
