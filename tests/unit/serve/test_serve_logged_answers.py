"""What the log says of answers: of workers and of upstreams, whole and broken off."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from chaccu.conversation import Conversation, Message
from chaccu.serve.gateway.errors import bad_request, worker_lost
from chaccu.serve.gateway.records.logged_answer import LoggedAnswer, UnreadableAnswerError, WorkerAnswer
from chaccu.serve.gateway.records.relayed_answer import RelayedAnswer
from chaccu.serve.gateway.workers.answer import AnswerPart, AnswerUsage, Job
from chaccu.serve.link import Sampling

USAGE = AnswerUsage(3, 2)
ASKED = Conversation(messages=(Message("user", "hi"),), system="Be brief.")
TIME = "2025-06-01T12:00:00.000Z"


def lines_of(answer: LoggedAnswer) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = json.loads(msgspec.json.encode(answer.lines(TIME)))
    return lines


class TestWorkers:
    def test_a_whole_answer(self) -> None:
        answer = WorkerAnswer("chatcmpl-1", Job(model="m", sampling=Sampling(), conversation=ASKED), "someone")
        assert not answer.is_answered
        answer.take(AnswerPart(["Hel", "lo"]))
        answer.take(AnswerPart([], "stop", USAGE))
        assert lines_of(answer) == [
            {
                "id": "chatcmpl-1",
                "time": TIME,
                "model": "m",
                "finish_reason": "stop",
                "system": "Be brief.",
                "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}],
                "user": "someone",
            }
        ]
        assert answer.size >= 7

    def test_an_answer_that_breaks_off_says_why(self) -> None:
        job = Job(model="m", sampling=Sampling(), conversation=ASKED)
        left, lost, refused = (WorkerAnswer("x", job, "") for _ in range(3))
        for answer in (left, lost):
            answer.take(AnswerPart(["Hel"]))
        lost.fail(worker_lost("m", "no other one joined"))
        refused.fail(bad_request("too long."))
        assert [lines_of(answer)[0]["finish_reason"] for answer in (left, lost)] == ["cancelled", "worker_lost"]
        assert "user" not in lines_of(left)[0]
        assert [answer.is_answered for answer in (left, lost, refused)] == [True, True, False]

    def test_a_reply_that_the_client_began_is_one_message(self) -> None:
        begun = Conversation(messages=(Message("user", "hi"), Message("assistant", None)))
        answer = WorkerAnswer("x", Job(model="m", sampling=Sampling(), conversation=begun, begun="He"), "")
        answer.take(AnswerPart(["llo"]))
        answer.take(AnswerPart([], "length", USAGE))
        (line,) = lines_of(answer)
        assert line["messages"][1:] == [{"role": "assistant", "content": "Hello"}]
        assert (line["finish_reason"], "system" in line) == ("length", False)

    def test_each_choice_is_a_line_of_its_own(self) -> None:
        answer = WorkerAnswer("x", Job(model="m", sampling=Sampling(), conversation=ASKED, n=3), "")
        answer.take(AnswerPart(["one"], index=0))
        answer.take(AnswerPart([], "stop", index=0))
        answer.take(AnswerPart(["tw"], index=1))
        answer.fail(worker_lost("m", "no other one joined"))
        lines = lines_of(answer)
        assert [line["messages"][-1]["content"] for line in lines] == ["one", "tw"]
        assert [line["finish_reason"] for line in lines] == ["stop", "worker_lost"]


BODY: dict[str, Any] = {
    "model": "up",
    "messages": [
        {"role": "system", "content": "Be"},
        {"role": "developer", "content": [{"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]},
    ],
    "user": "someone",
    "temperature": 0.5,
}


def chunk(delta: dict[str, Any] | None, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {
        "id": "cc-7",
        "object": "chat.completion.chunk",
        "choices": [{"index": index, "delta": delta, "finish_reason": finish}],
    }


def relayed(
    *pieces: bytes | dict[str, Any],
    body: dict[str, Any] = BODY,
    status: int = 200,
    broken_off: str | None = None,
    streamed: bool = True,
) -> RelayedAnswer:
    """An upstream's answer; objects are events."""
    answer = RelayedAnswer("up", json.dumps(body).encode())
    answer.begin(status, "text/event-stream; charset=utf-8" if streamed else "application/json")
    for piece in pieces:
        if isinstance(piece, bytes):
            answer.take(piece)
        else:
            answer.take(b"data: " + json.dumps(piece).encode() + b"\n\n" if streamed else json.dumps(piece).encode())
    answer.broken_off = broken_off
    return answer


class TestUpstreams:
    def test_a_stream_is_joined_wherever_its_pieces_end(self) -> None:
        events = [chunk({"role": "assistant", "content": ""}), chunk({"content": "Né"}), chunk({"content": "🦙"})]
        data = b"".join(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\r\n\r\n" for event in events)
        ending = b": ping\n\ndata:" + json.dumps(chunk({}, "stop")).encode() + b"\n\ndata: [DONE]\n\n"
        pieces = [bytes([byte]) for byte in data + ending]
        assert lines_of(relayed(*pieces)) == [
            {
                "id": "cc-7",
                "time": TIME,
                "model": "up",
                "finish_reason": "stop",
                "system": "Be\n\nbrief.",
                "messages": [{"role": "user", "content": "two parts"}, {"role": "assistant", "content": "Né🦙"}],
                "user": "someone",
            }
        ]

    def test_a_whole_answer_with_several_choices_is_a_line_each(self) -> None:
        choices = [
            {"index": n, "message": {"role": "assistant", "content": f"answer {n}"}, "finish_reason": reason}
            for n, reason in enumerate(("stop", "length"))
        ]
        lines = lines_of(relayed({"id": "cc-8", "choices": choices}, streamed=False))
        assert [(line["id"], line["finish_reason"], line["messages"][-1]["content"]) for line in lines] == [
            ("cc-8", "stop", "answer 0"),
            ("cc-8-1", "length", "answer 1"),
        ]

    def test_choices_of_a_stream_are_told_apart(self) -> None:
        events = [chunk({"content": "a"}), chunk({"content": "b"}, index=1), chunk({}, "stop", 1), chunk({"content": "c"})]
        lines = lines_of(relayed(*events, broken_off="cancelled"))
        assert [(line["messages"][-1]["content"], line["finish_reason"]) for line in lines] == [
            ("ac", "cancelled"),
            ("b", "stop"),
        ]

    def test_calls_of_tools_are_kept(self) -> None:
        call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}
        events = [
            chunk({"tool_calls": [call]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"place":'}}]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": ' "La Paz"}'}}]}),
            chunk({}, "tool_calls"),
        ]
        (line,) = lines_of(relayed(*events))
        written = {"name": "weather", "arguments": '{"place": "La Paz"}'}
        assert line["messages"][-1] == {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": written}],
        }
        assert line["finish_reason"] == "tool_calls"
        whole = {"choices": [{"message": {"content": None, "tool_calls": [{**call, "index": None}]}}]}
        history = [*BODY["messages"], line["messages"][-1], {"role": "tool", "tool_call_id": "c1", "content": "14"}]
        (line,) = lines_of(relayed(whole, body={**BODY, "messages": history}, streamed=False))
        assert line["messages"][1:3] == [
            {"role": "assistant", "content": None, "tool_calls": history[-2]["tool_calls"]},
            {"role": "tool", "content": "14"},
        ]
        assert line["id"].startswith("chatcmpl-")

    def test_what_is_no_text_is_null(self) -> None:
        image = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
        messages = [{"role": "user", "content": image}, "odd", {"role": "system", "content": "late"}]
        (line,) = lines_of(relayed(chunk({"content": "A map."}, "stop"), body={"messages": messages}))
        assert line["messages"][:-1] == [
            {"role": "user", "content": None},
            {"role": None, "content": None},
            {"role": "system", "content": "late"},
        ]

    @pytest.mark.parametrize(
        ("pieces", "broken_off", "finish"),
        [
            ([], "cancelled", "cancelled"),
            ([b'data: {"choices": [{"ind'], "cancelled", "cancelled"),
            ([], "upstream_lost", "upstream_lost"),
            ([], None, None),
            ([{"error": {"message": "out of memory", "code": "engine_failed"}}], None, "engine_failed"),
            ([{"error": "out of memory"}], None, "failed"),
            ([b"data: no JSON\n\n", chunk({"content": "more"}, "stop")], None, "unreadable"),
            ([chunk({}, "stop"), b"data: no JSON\n\n"], None, "unreadable"),
            ([chunk({}, "stop")], "cancelled", "stop"),
        ],
    )
    def test_how_a_stream_ended(self, pieces: list[bytes | dict[str, Any]], broken_off: str | None, finish: str | None) -> None:
        (line,) = lines_of(relayed(chunk({"content": "Once"}), *pieces, broken_off=broken_off))
        assert (line["messages"][-1]["content"], line["finish_reason"]) == ("Once", finish)

    def test_what_was_not_answered_is_no_line(self) -> None:
        assert not relayed({"error": {"message": "no"}}, status=400, streamed=False).is_answered
        assert not relayed().is_answered
        assert lines_of(relayed({"error": {"message": "no"}}, streamed=False)) == []
        assert lines_of(relayed(chunk({"role": "assistant", "content": ""}), broken_off="cancelled")) == []
        assert lines_of(relayed(b'{"choices": [{"mess', streamed=False, broken_off="cancelled")) == []

    @pytest.mark.parametrize("data", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"index": "x"}]}', b"\xff"])
    def test_what_is_no_chat_completion_is_said(self, data: bytes) -> None:
        with pytest.raises(UnreadableAnswerError, match="'up' sent no"):
            relayed(data, streamed=False).lines(TIME)

    def test_an_endless_answer_is_not_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("chaccu.serve.gateway.records.relayed_answer._MAX_KEPT_BYTES", 1000)
        answer = relayed(*[b"x" * 100] * 20)
        assert answer.size <= 1000 + len(json.dumps(BODY))
        with pytest.raises(UnreadableAnswerError, match="2,000 bytes; 1,000 are kept"):
            answer.lines(TIME)
