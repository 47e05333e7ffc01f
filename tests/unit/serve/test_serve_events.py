"""How streams that have begun break off, in the dialects with named events."""

from __future__ import annotations

import json
from typing import Any

from chaccu.serve.gateway.dialects.messages import MESSAGES
from chaccu.serve.gateway.dialects.openai_responses import RESPONSES
from chaccu.serve.gateway.errors import worker_lost
from chaccu.serve.gateway.workers.answer import AnswerPart

LOST = worker_lost("m", "no other one joined")


def events_of(data: bytes) -> list[dict[str, Any]]:
    """The events' data; each event's name is its type."""
    events = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, body = event.split("\n")
        events.append(json.loads(body.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_a_response_that_breaks_off_keeps_its_text_and_its_numbers() -> None:
    writer = RESPONSES.read({"model": "m", "input": "hi", "stream": True}).writer
    data = writer.opening(AnswerPart(["Hé"], prompt_tokens=3)) + writer.texts(AnswerPart(["Hé", "\x00🦙"]))
    events = events_of(data + writer.failure(LOST))
    assert [event["sequence_number"] for event in events] == list(range(8))
    failed, error = events[-2:]
    assert (failed["type"], failed["response"]["status"], failed["response"]["usage"]) == ("response.failed", "failed", None)
    assert failed["response"]["error"] == {"code": "server_error", "message": LOST.message}
    assert failed["response"]["output"][0]["content"][0]["text"] == "Hé\x00🦙"
    assert (error["code"], error["error"]["code"], error["message"]) == ("worker_lost", "worker_lost", LOST.message)


def test_a_message_that_breaks_off_says_so_in_an_event() -> None:
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    writer = MESSAGES.read(asked).writer
    data = writer.opening(AnswerPart(["Hé"], prompt_tokens=3)) + writer.texts(AnswerPart(["Hé", "\x00🦙"]))
    *begun, error = events_of(data + writer.failure(LOST))
    assert begun[0]["message"]["usage"] == {"input_tokens": 3, "output_tokens": 0}
    assert "".join(event["delta"]["text"] for event in begun[2:]) == "Hé\x00🦙"
    assert error["error"] == {
        "type": "overloaded_error",
        "message": LOST.message,
        "details": {"error_code": "worker_lost"},
    }
