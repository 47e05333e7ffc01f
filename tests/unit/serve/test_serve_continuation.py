"""How a stream goes on that its upstream has broken off."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chaccu.serve.gateway.upstreams.continuation import Continuation, plan_continuation
from chaccu.serve.gateway.upstreams.sent_stream import CannotContinueError

CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "max_tokens": 10,
    "stream_options": {"include_usage": True},
}
RAW: dict[str, Any] = {"model": "m", "prompt": "Once", "stream": True, "max_tokens": 10}
DONE = "[DONE]"


def said(
    text: str | None = None, *, id: str = "first", finish: str | None = None, index: int = 0, **more: Any
) -> dict[str, Any]:
    delta = {**({} if text is None else {"content": text}), **more}
    return {"id": id, "created": 1, "model": "m", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def wrote(text: str, *, id: str = "first", finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish, **more}
    return {"id": id, "created": 1, "model": "m", "choices": [choice]}


def used(prompt: int, completion: int, *, id: str = "first") -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"id": id, "created": 1, "model": "m", "choices": [], "usage": usage}


ROLE = said("", role="assistant")


def lines(*events: dict[str, Any] | str) -> bytes:
    return b"".join(b"data: %b\n\n" % (one if isinstance(one, str) else json.dumps(one)).encode() for one in events)


def plan(
    request: dict[str, Any], *events: dict[str, Any] | str, may_prefix: bool = True, endpoint: str = "chat/completions"
) -> Continuation:
    return plan_continuation(endpoint, json.dumps(request).encode(), lines(*events), may_prefix=may_prefix)


def asked(continuation: Continuation) -> Any:
    assert continuation.body is not None
    return json.loads(continuation.body)


def follow(continuation: Continuation, *events: dict[str, Any] | str) -> list[Any]:
    """What the client gets of the next upstream's events, which come in odd pieces of whole lines."""
    assert continuation.stream is not None
    got = b"".join(map(continuation.stream.take, lines(*events).splitlines(keepends=True)))
    return read(got)


def read(data: bytes) -> list[Any]:
    events = [one.removeprefix(b"data: ") for one in data.split(b"\n\n") if one]
    return [DONE if one == b"[DONE]" else json.loads(one) for one in events]


def texts(events: list[Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for event in events if event != DONE for choice in event["choices"])


class TestGoingOn:
    def test_the_answer_so_far_is_the_last_message(self) -> None:
        going = plan(CHAT, ROLE, said("One"), said(" two"))
        assert going.is_prefix
        assert asked(going) == {
            **CHAT,
            "messages": [*CHAT["messages"], {"role": "assistant", "content": "One two"}],
            "max_tokens": 8,
            "continue_final_message": True,
            "add_generation_prompt": False,
        }
        got = follow(
            going,
            said("", id="second", role="assistant"),
            said(" three", id="second", role="assistant"),
            said(None, id="second", finish="stop"),
            used(7, 1, id="second"),
            DONE,
        )
        assert got == [said(" three"), said(None, finish="stop"), used(5, 3), DONE]

    @pytest.mark.parametrize(("told", "prompt"), [({"continued_tokens": 0}, 7), ({"cached_tokens": 4}, 5), (None, 5)])
    def test_a_server_that_tells_how_it_counts_what_it_goes_on_from_is_believed(self, told: Any, prompt: int) -> None:
        going = plan(CHAT, ROLE, said("One"), said(" two"))
        usage = used(7, 1)
        usage["usage"]["prompt_tokens_details"] = told
        (got,) = follow(going, usage)
        assert got["usage"] == {**used(prompt, 3)["usage"], "prompt_tokens_details": told}

    def test_a_raw_answer_stands_behind_its_prompt(self) -> None:
        going = plan(RAW, wrote(" upon"), wrote(" a"), endpoint="completions")
        assert asked(going) == {**RAW, "prompt": "Once upon a", "max_tokens": 8}
        assert follow(going, wrote(" time", id="x"), wrote("", id="x", finish="length"), DONE) == [
            wrote(" time"),
            wrote("", finish="length"),
            DONE,
        ]

    def test_a_message_that_the_client_has_begun_goes_on(self) -> None:
        flags = {"continue_final_message": True, "add_generation_prompt": False}
        begun = {**CHAT, **flags, "messages": [*CHAT["messages"], {"role": "assistant", "content": "Well,"}]}
        assert asked(plan(begun, said(" yes")))["messages"][-1] == {"role": "assistant", "content": "Well, yes"}

    def test_spaces_at_the_end_are_asked_for_again_and_given_once(self) -> None:
        events = (ROLE, said("One."), said("\n\n"))
        going = plan(CHAT, *events)
        assert (asked(going)["messages"][-1]["content"], asked(going)["max_tokens"]) == ("One.", 9)
        assert texts(follow(going, said("\n\n"), said("Two"), said("\n\n"))) == "Two\n\n"
        assert texts(follow(plan(CHAT, *events), said("\n"), said("\nTwo"))) == "Two"
        # Where they do not come again, nothing is taken away.
        assert texts(follow(plan(CHAT, *events), said("Two"), said("\n\nThree"))) == "Two\n\nThree"

    def test_tokens_are_counted_by_the_usage_where_it_is_told(self) -> None:
        events = [{**said(text), "usage": used(5, count)["usage"]} for text, count in (("One two", 2), (" three four", 4))]
        going = plan({**CHAT, "min_tokens": 6}, *events)
        assert (asked(going)["max_tokens"], asked(going)["min_tokens"]) == (6, 2)
        (last, _) = follow(going, used(10, 3), DONE)
        assert last == used(5, 7)

    def test_a_stream_that_breaks_off_twice_goes_on_twice(self) -> None:
        first = plan(CHAT, ROLE, said("One"))
        sent = [ROLE, said("One"), *follow(first, said("", role="assistant", id="second"), said(" two", id="second"))]
        second = plan(CHAT, *sent)
        assert (asked(second)["messages"][-1]["content"], asked(second)["max_tokens"]) == ("One two", 8)
        assert follow(second, said(" three", id="third"), used(7, 1)) == [said(" three"), used(5, 3)]

    def test_a_line_without_its_end_is_ended(self) -> None:
        body = json.dumps(CHAT).encode()
        going = plan_continuation("chat/completions", body, lines(said("One"))[:-1], may_prefix=True)
        assert going.opening == b"\n"
        assert asked(going)["messages"][-1]["content"] == "One"


class TestFromTheBeginning:
    @pytest.mark.parametrize("events", [(), (ROLE,), (ROLE, said(""))])
    def test_what_has_no_text_yet_is_asked_again(self, events: tuple[Any, ...]) -> None:
        request = {**CHAT, "tools": [{}], "n": 2}
        going = plan(request, *events)
        assert asked(going) == request
        got = follow(going, said("", role="assistant", id="x"), said("Hi", id="x", role="assistant"), used(3, 1))
        assert [choice["delta"].get("role") for event in got for choice in event["choices"]].count("assistant") == (not events)
        assert texts(got) == "Hi"
        assert got[-1]["usage"] == used(3, 1)["usage"]

    @pytest.mark.parametrize(
        "more", [{"temperature": 0}, {"seed": 0}, {"temperature": 0.0, "response_format": {"type": "json"}}]
    )
    def test_the_same_text_again_is_left_out(self, more: dict[str, Any]) -> None:
        request = {**CHAT, **more}
        going = plan(request, ROLE, said("One"), said(" two"), may_prefix=False)
        assert (asked(going), going.is_prefix) == (request, False)
        again = [said("", role="assistant"), said("One t"), said("wo three"), said(None, finish="stop"), used(5, 3), DONE]
        assert follow(going, *again) == [said(" three"), said(None, finish="stop"), used(5, 3), DONE]

    @pytest.mark.parametrize(
        "again", [(said("One"), said(" too")), (said("One"), said(None, finish="stop")), (said("One"), DONE)]
    )
    def test_another_text_is_an_error(self, again: tuple[Any, ...]) -> None:
        going = plan({**CHAT, "seed": 1, "guided_json": {}}, said("One two"))
        with pytest.raises(CannotContinueError, match="wrote another text"):
            follow(going, *again)


class TestWhatIsWhole:
    def test_only_its_end_was_missing(self) -> None:
        assert plan(CHAT, said("One"), said(None, finish="stop"), used(5, 1), DONE) == Continuation(b"")
        for request, *events in (
            (CHAT, said("One"), said(None, finish="stop"), used(5, 1)),
            ({**CHAT, "stream_options": None}, said("One"), said(None, finish="stop")),
        ):
            assert plan(request, *events) == Continuation(lines(DONE))

    def test_a_usage_that_was_told_before_is_told_at_the_end(self) -> None:
        told = used(5, 1)["usage"]
        ended = plan(CHAT, {**said("One"), "usage": told}, {**said(None, finish="stop"), "usage": told})
        assert (read(ended.opening), ended.body) == ([used(5, 1), DONE], None)

    def test_its_usage_is_asked_for(self) -> None:
        ended = plan({**CHAT, "min_tokens": 5}, said("One"), said(" two", finish="stop"))
        assert asked(ended) == {**CHAT, "max_tokens": 1}
        got = follow(ended, said("", role="assistant"), said("One"), said(None, finish="length"), used(5, 1, id="x"), DONE)
        assert got == [used(5, 2), DONE]

    def test_the_last_token_was_the_last(self) -> None:
        request = {**CHAT, "max_tokens": 2, "stream_options": None}
        ended = plan(request, said("One"), said(" two"))
        finish, done = read(ended.opening)
        assert (finish["id"], finish["choices"][0]["finish_reason"], done, ended.body) == ("first", "length", DONE, None)


class TestErrors:
    @pytest.mark.parametrize(
        ("request_", "events", "why"),
        [
            ({**CHAT, "response_format": {"type": "json_object"}}, [said("{")], "an answer with 'response_format'"),
            ({**CHAT, "tools": [{}]}, [said("a")], "an answer with 'tools'"),
            ({**CHAT, "n": 2}, [said("a")], "an answer with 'n'"),
            ({**CHAT, "unknown": 1}, [said("a")], "an answer with 'unknown'"),
            ({**CHAT, "messages": [{"role": "assistant", "content": "x"}]}, [said("a")], "a last message of the assistant"),
            (CHAT, [said("a"), said(None, tool_calls=[{}])], "more than the text of one answer"),
            (CHAT, [said("a"), said("b", index=1)], "more than the text of one answer"),
            (CHAT, [said(None, reasoning_content="hm")], "more than the text of one answer"),
            ({**CHAT, "seed": 1}, [said(None, reasoning_content="hm"), said("a")], "more than the text of one answer"),
            (CHAT, [said("a"), {"error": {"message": "x"}}], "an error of the upstream itself"),
            (CHAT, [{"n": 1}], "no completion"),
            (CHAT, ["{"], "no completion"),
            (CHAT, [{"choices": [{"index": 0, "delta": {"content": ["a"]}}]}], "no completion"),
            (CHAT, [{**said("a"), "usage": {}}], "no completion"),
        ],
    )
    def test_what_is_not_sound_says_why(self, request_: dict[str, Any], events: list[Any], why: str) -> None:
        with pytest.raises(CannotContinueError, match=why):
            plan(request_, *events)

    @pytest.mark.parametrize(
        ("more", "why"),
        [
            ({"logprobs": 2}, "'logprobs'"),
            ({"echo": True}, "'echo'"),
            ({"prompt": [1, 2]}, "not one text"),
            ({"max_tokens": None}, "no max_tokens"),
        ],
    )
    def test_raw_answers_too(self, more: dict[str, Any], why: str) -> None:
        with pytest.raises(CannotContinueError, match=why):
            plan({**RAW, **more}, wrote("a"), endpoint="completions")

    def test_an_answer_with_what_asks_for_nothing_goes_on(self) -> None:
        neutral = {"tools": [], "n": 1, "response_format": {"type": "text"}, "echo": None, "user": "me", "logprobs": True}
        assert plan({**CHAT, **neutral}, said("a")).is_prefix

    def test_a_next_one_that_sends_no_completions_is_an_error(self) -> None:
        going = plan(CHAT, said("a"))
        with pytest.raises(CannotContinueError, match="sent no completion"):
            follow(going, "<html>")

    def test_an_error_of_the_next_one_passes(self) -> None:
        assert follow(plan(CHAT, said("a")), {"error": {"message": "x"}}) == [{"error": {"message": "x"}}]

    def test_other_endpoints_are_not_gone_on_with(self) -> None:
        with pytest.raises(CannotContinueError, match="answers of embeddings"):
            plan(CHAT, endpoint="embeddings")
