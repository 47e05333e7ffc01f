"""Anthropic's Messages of a real gateway with real workers, through the official client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest

from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.serve.gateway.access.limits import Limits
from chaccu.testing.processes import Service, start_gateway, start_worker

HELLO = [{"role": "user", "content": "Hi"}]
ANSWER = "One answer, naïve 🦙 and\nin two lines."


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("messages")
    with (
        start_gateway(folder, "--upstream", "gone=http://127.0.0.1:9/v1") as service,
        start_worker(folder, service, f"scripted:fixed?text={ANSWER}&context_tokens=200"),
        start_worker(folder, service, "scripted:mirror?echo=1"),
        start_worker(folder, service, "scripted:silent?text="),
    ):
        yield service


@pytest.fixture
def client(gateway: Service) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)


def ask(client: anthropic.Anthropic, model: str = "fixed", **more: Any) -> anthropic.types.Message:
    return client.messages.create(**{"model": model, "max_tokens": 100, "messages": HELLO, **more})


def test_a_whole_answer(client: anthropic.Anthropic) -> None:
    answer = ask(client)
    assert [(block.type, block.text) for block in answer.content] == [("text", ANSWER)]
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "fixed")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.output_tokens == len(ANSWER.split())
    assert answer.usage.input_tokens > 10
    assert answer.id.startswith("msg_")


def test_the_tokens_of_a_prompt_are_counted_as_an_answer_counts_them(client: anthropic.Anthropic) -> None:
    for more in ({}, {"system": "Be brief."}, {"messages": [*HELLO, {"role": "assistant", "content": "One"}, *HELLO]}):
        counted = client.messages.count_tokens(**{"model": "fixed", "messages": HELLO, **more})
        assert counted.input_tokens == ask(client, **more).usage.input_tokens
    for model, error in (("nobody", anthropic.NotFoundError), ("gone", anthropic.BadRequestError)):
        with pytest.raises(error) as caught:
            client.messages.count_tokens(model=model, messages=HELLO)
        assert caught.value.body["type"] == "error"


def test_a_streamed_answer(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="fixed", max_tokens=100, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == ANSWER
        streamed = stream.get_final_message()
    whole = ask(client)
    assert (streamed.content[0].text, streamed.usage.output_tokens) == (ANSWER, whole.usage.output_tokens)
    assert (streamed.stop_reason, streamed.usage.input_tokens) == ("end_turn", whole.usage.input_tokens)


def test_the_events_of_a_stream_are_in_their_order(client: anthropic.Anthropic) -> None:
    kinds = [event.type for event in ask(client, stream=True)]
    begin, end = ["message_start", "content_block_start"], ["content_block_stop", "message_delta", "message_stop"]
    assert kinds == [*begin, *["content_block_delta"] * (len(kinds) - 5), *end]
    assert len(kinds) > 8
    assert [event.type for event in ask(client, "silent", stream=True)] == ["message_start", "message_delta", "message_stop"]
    assert ask(client, "silent").content == []


@pytest.mark.parametrize("streamed", [False, True])
def test_why_an_answer_ended(client: anthropic.Anthropic, streamed: bool) -> None:
    def end(**more: Any) -> tuple[str, str | None, str | None]:
        if not streamed:
            whole = ask(client, **more)
            return whole.content[0].text, whole.stop_reason, whole.stop_sequence
        with client.messages.stream(**{"model": "fixed", "max_tokens": 100, "messages": HELLO, **more}) as stream:
            last = stream.get_final_message()
        return last.content[0].text, last.stop_reason, last.stop_sequence

    assert end(max_tokens=2) == ("One answer,", "max_tokens", None)
    assert end(stop_sequences=["nowhere", " and"]) == (ANSWER.partition(" and")[0], "stop_sequence", " and")
    assert end(stop_sequences=["nowhere"]) == (ANSWER, "end_turn", None)


def test_text_in_blocks_and_a_system_text(client: anthropic.Anthropic) -> None:
    def blocks(*texts: str) -> list[Any]:
        return [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in texts]

    plain = ask(client, "mirror", system="Be brief.", messages=[{"role": "user", "content": "one two"}])
    parts = ask(client, "mirror", system=blocks("Be ", "brief."), messages=[{"role": "user", "content": blocks("one ", "two")}])
    assert plain.content == parts.content
    assert "Be brief." in plain.content[0].text
    assert "one two" in plain.content[0].text


def test_an_answer_that_the_client_begins_is_gone_on_with(client: anthropic.Anthropic) -> None:
    begun = [*HELLO, {"role": "assistant", "content": ANSWER[:11]}]
    assert ask(client, messages=begun).content[0].text == ANSWER[11:]


def test_parameters_that_ask_for_nothing_are_accepted(client: anthropic.Anthropic) -> None:
    answer = ask(
        client,
        # The client has given up these three; the wire has not.
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 40},
        metadata={"user_id": "someone"},
        tools=[],
        thinking={"type": "disabled"},
        service_tier="auto",
    )
    assert answer.content[0].text == ANSWER


WRONG: dict[str, tuple[dict[str, Any] | str, int, str, str]] = {
    "no JSON": ("{", 400, "invalid_request_error", "no valid JSON"),
    "no max_tokens": ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
    "no messages": ({"messages": []}, 400, "invalid_request_error", "messages"),
    "far model": ({"model": "fixd"}, 404, "not_found_error", "did you mean 'fixed'?"),
    "hot": ({"temperature": 1.5}, 400, "invalid_request_error", "temperature = 1.5"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0].type = 'image'",
    ),
    "system as a turn": ({"messages": [{"role": "system", "content": "Be brief."}]}, 400, "invalid_request_error", "system"),
    "tools": ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools"),
    "a tool's result": (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        400,
        "invalid_request_error",
        "tool_result",
    ),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, 400, "invalid_request_error", "thinking"),
    "OpenAI's stop": ({"stop": ["x"]}, 400, "invalid_request_error", "'stop' is no parameter of this request"),
    "no block": ({"messages": [{"role": "user", "content": []}]}, 400, "invalid_request_error", "content"),
    "long prompt": ({"messages": [{"role": "user", "content": "x" * 500}]}, 400, "invalid_request_error", "context holds 200"),
    "an upstream": ({"model": "gone"}, 400, "invalid_request_error", "/v1/chat/completions"),
    "5 MB": ({"system": "x" * 5_000_000}, 413, "request_too_large", "4,194,304"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("streamed", [False, True])
async def test_wrong_requests_get_anthropics_errors(http: aiohttp.ClientSession, case: str, streamed: bool) -> None:
    given, status, kind, text = WRONG[case]
    if isinstance(given, dict):
        whole = {"model": "fixed", "max_tokens": 9, "messages": HELLO, "stream": streamed, **given}
        given = json.dumps({name: value for name, value in whole.items() if value is not None})
    async with http.post("/v1/messages", data=given) as response:
        body = await response.json()
    assert (response.status, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert text in body["error"]["message"]
    assert set(body) == {"type", "error"}
    assert "`" not in body["error"]["message"]


async def test_a_wrong_method_is_told_in_the_same_way(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/messages") as response:
        assert (response.status, (await response.json())["error"]["type"]) == (405, "invalid_request_error")


def test_the_client_raises_what_fits(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="fixed") as unknown:
        ask(client, "fixd")
    assert (unknown.value.type, unknown.value.error_code) == ("not_found_error", "model_not_found")
    with pytest.raises(anthropic.BadRequestError, match=r"temperature = 1\.5"):
        ask(client, extra_body={"temperature": 1.5})


def test_keys_and_their_limits_hold(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    shown, _ = KeyFile(keys).create("alice", limits=Limits(requests_per_minute=1))
    worker_key, _ = KeyFile(keys).create("gpu", scopes=["worker"])
    with (
        start_gateway(tmp_path, "--keys", str(keys)) as gateway,
        start_worker(tmp_path, gateway, f"scripted:fixed?text={ANSWER}", "--join-token", worker_key),
    ):
        with pytest.raises(anthropic.AuthenticationError, match="not known here"):
            ask(anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0))
        with pytest.raises(anthropic.PermissionDeniedError, match="this needs chat"):
            ask(anthropic.Anthropic(base_url=gateway.url, api_key=worker_key, max_retries=0))
        # The client sends it as x-api-key.
        alice = anthropic.Anthropic(base_url=gateway.url, api_key=shown, max_retries=0)
        assert ask(alice).content[0].text == ANSWER
        with pytest.raises(anthropic.RateLimitError, match="1 request") as beyond:
            ask(alice)
        assert beyond.value.type == "rate_limit_error"
        assert int(beyond.value.response.headers["retry-after"]) > 0
