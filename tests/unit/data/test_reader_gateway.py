"""The gateway's log: what goes on stays once, what was cut off goes by name, and the books balance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars
import pytest

from chaccu.conversation import Conversation
from chaccu.data.clean import CleanReport, clean_conversations
from chaccu.data.outcome import Drop
from chaccu.data.readers import gateway, regroup_records
from chaccu.data.records import RawRecord, bare_source, read_conversations

ROLES = ("user", "assistant")


def line(name: str, *texts: str, finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    """A line of the log: questions and answers in turn."""
    messages = [{"role": ROLES[place % 2], "content": text} for place, text in enumerate(texts)]
    head = {"id": name, "time": "2025-06-01T12:00:00.000Z", "model": "tuned", "finish_reason": finish}
    return {**head, "messages": messages, **more}


def say(text: str) -> str:
    """A text long enough for the default steps, unlike others."""
    return " ".join(f"{text}{place}" for place in range(12))


Q, A = [say(f"question{n}x") for n in range(5)], [say(f"answer{n}x") for n in range(5)]
GOES_ON = "beginning of a later conversation"


def clean(folder: Path, *files: list[dict[str, Any]]) -> tuple[CleanReport, dict[str, Conversation]]:
    """The report and the conversations by id."""
    paths = []
    for number, lines in enumerate(files):
        path = folder / f"conversations-2025-06-0{number + 1}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))
        paths.append(str(path))
    report = clean_conversations(paths, folder / "out", validation_share=0)
    assert report.read == report.kept + report.total_dropped
    return report, {one.id: one for one in read_conversations(folder / "out" / "train.jsonl")}


def texts_of(conversation: Conversation) -> list[str | None]:
    return [message.content for message in conversation.messages]


def test_a_conversation_that_went_on_is_one(tmp_path: Path) -> None:
    lines = [
        line("one", Q[0], A[0]),
        line("other", Q[1], A[1], system="Be brief."),
        line("two", Q[0], A[0], Q[2], A[2]),
        line("three", Q[0], f"  {A[0]}\n", Q[2], A[2], Q[3], A[3]),
    ]
    report, kept = clean(tmp_path, lines)
    assert list(kept) == ["other", "three"]
    assert texts_of(kept["three"]) == [Q[0], f"  {A[0]}\n", Q[2], A[2], Q[3], A[3]]
    assert kept["other"].system == "Be brief."
    assert (report.read, report.kept) == (4, 2)
    assert report.dropped == {"read": {GOES_ON: 2}}


def test_forks_of_one_conversation_stay_on_one_side(tmp_path: Path) -> None:
    _, kept = clean(tmp_path, [line("one", Q[0], A[0]), line("a", Q[0], A[0], Q[1], A[1]), line("b", Q[0], A[0], Q[2], A[2])])
    assert list(kept) == ["a", "b"]
    assert kept["a"].source == kept["b"].source
    assert "#" in kept["a"].source
    assert len({bare_source(gateway_source(texts)) for texts in ((Q[0], A[0]), (Q[0], A[1]), (Q[1], A[0]))}) == 3


def gateway_source(texts: tuple[str, str]) -> str:
    draft = gateway.parse(line("x", *texts), 1, "log")
    assert not isinstance(draft, Drop)
    return draft.source


@pytest.mark.parametrize("finish", ["length", "cancelled", "worker_lost", "content_filter"])
def test_an_answer_that_was_cut_off_is_dropped_by_name(tmp_path: Path, finish: str) -> None:
    report, kept = clean(tmp_path, [line("whole", Q[1], A[1]), line("cut", Q[0], A[0], finish=finish)])
    assert list(kept) == ["whole"]
    assert report.dropped == {"read": {f"answer was cut off ({finish})": 1}}


@pytest.mark.parametrize("finish", [None, 7, "two words", "x" * 100])
def test_a_reason_that_nobody_knows_is_none(tmp_path: Path, finish: Any) -> None:
    report, kept = clean(tmp_path, [line("whole", Q[1], A[1]), {**line("cut", Q[0], A[0]), "finish_reason": finish}])
    assert list(kept) == ["whole"]
    assert report.dropped == {"read": {"answer was cut off (no known reason)": 1}}


def test_what_was_said_before_a_cut_answer_stays_once(tmp_path: Path) -> None:
    # The log began in the middle of this conversation: its first round is on no line of its own.
    lines = [
        line("late", Q[0], A[0], Q[1], A[1], finish="length"),
        line("again", Q[0], A[0], Q[1], A[1], finish="length"),
        line("known", Q[2], A[2]),
        line("more", Q[2], A[2], Q[3], A[3], finish="cancelled"),
    ]
    report, kept = clean(tmp_path, lines)
    assert {name: texts_of(one) for name, one in kept.items()} == {"late": [Q[0], A[0]], "known": [Q[2], A[2]]}
    cuts = {"answer was cut off (length)": 2, "answer was cut off (cancelled)": 1}
    assert (report.read, report.kept, report.dropped, report.changed) == (5, 2, {"read": cuts}, {})


def test_a_cut_answer_is_not_learned_from_a_later_line(tmp_path: Path) -> None:
    shown = A[1][:40]
    lines = [
        line("one", Q[0], A[0]),
        line("stopped", Q[0], A[0], Q[1], A[1], finish="cancelled"),
        line("on", Q[0], A[0], Q[1], shown, Q[2], A[2]),
        line("further", Q[0], A[0], Q[1], shown, Q[2], A[2], Q[3], A[3]),
    ]
    report, kept = clean(tmp_path, lines)
    assert {name: texts_of(one) for name, one in kept.items()} == {"further": [Q[0], A[0], Q[2], A[2], Q[3], A[3]]}
    assert report.dropped == {"read": {GOES_ON: 2, "answer was cut off (cancelled)": 1}}
    assert report.changed == {"roles": {"turn without text": 1}}


def test_an_answer_given_again_or_gone_on_with_is_whole(tmp_path: Path) -> None:
    lines = [
        line("cut", Q[0], A[0], finish="length"),
        line("finished", Q[0], A[0] + A[1]),
        line("on", Q[0], A[0] + A[1], Q[2], A[2]),
        line("broken", Q[3], A[3] + A[4], finish="worker_lost"),
        line("retried", Q[3], A[3]),
        line("retried-on", Q[3], A[3], Q[4], A[4]),
    ]
    report, kept = clean(tmp_path, lines)
    assert {name: len(one.messages) for name, one in kept.items()} == {"on": 4, "retried-on": 4}
    assert report.changed == {}


def test_calls_of_tools_are_text_and_whole(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "La Paz, Bolivia"}'}}
    first = line("call", Q[0], "", finish="tool_calls")
    first["messages"][1] = {"role": "assistant", "content": None, "tool_calls": [call]}
    second = line("answer")
    second["messages"] = [*first["messages"], {"role": "tool", "content": "14 degrees"}, {"role": "assistant", "content": A[0]}]
    report, kept = clean(tmp_path, [first, second])
    written = '{"name":"weather","arguments":{"place":"La Paz, Bolivia"}}'
    assert texts_of(kept["answer"]) == [Q[0], written, "14 degrees", A[0]]
    assert report.dropped == {"read": {GOES_ON: 1}}


def test_the_day_that_is_read_first_wins_and_the_newest_first_is_right(tmp_path: Path) -> None:
    begun, gone_on = [line("begun", Q[0], A[0])], [line("on", Q[0], A[0], Q[1], A[1])]
    report, kept = clean(tmp_path, gone_on, begun)
    assert list(kept) == ["on"]
    assert report.dropped == {"forks": {"beginning of an earlier conversation": 1}}


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_MAX_HELD_BYTES", 1000)
    taken: list[int] = []

    def records() -> Iterator[RawRecord]:
        for number in range(1, 11):
            taken.append(number)
            yield RawRecord(number, json.dumps(line(f"n{number}", f"{number}", "x" * 400)).encode(), 0, 0)

    waiting = [taken[-1] - record.number for record in regroup_records("gateway", records())]
    assert [len(taken), len(waiting)] == [10, 10]
    assert max(waiting) == 1


def test_rubbish_and_foreign_lines_pass_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    torn = json.dumps(line("torn", Q[4], A[4]))[:60]
    odd = [line("system", Q[2], A[2], system=7), {"messages": []}, {**line("x"), "messages": ["no", {"role": 3}]}]
    good = [line("one", Q[0], A[0]), line("two", Q[0], A[0], Q[1], A[1])]
    path.write_text("\n".join([json.dumps(good[0]), torn, *map(json.dumps, odd), "  " + json.dumps(good[1]), ""]))
    report = clean_conversations([str(path)], tmp_path / "out", validation_share=0)
    assert report.dropped["read"] == {"invalid JSON": 1, "system is no text": 1, GOES_ON: 1}
    assert (report.read, report.kept) == (6, 1)
    assert report.dropped["roles"] == {"no turns": 1, "turn without text": 1}
    ledger = polars.read_parquet(tmp_path / "out" / "ledger.parquet")
    assert set(ledger["origin"]) == {str(path)}
