"""Functions that a model may call, behind a worker whose server can: with the official clients, in every dialect."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from chaccu.engine.scripted import build_byte_backend
from chaccu.testing.fake_completions import FakeCompletions, write_fake_vllm
from chaccu.testing.fake_tool_calls import ARGUMENTS, WORDS
from chaccu.testing.processes import Service, start_gateway, start_worker, wait_until

ARGUED, SAID = {"place": "La Paz"}, "".join(WORDS)
NONE = [{"type": "text", "text": "none"}]
SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}}
ASKED: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How warm is it?"}]


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Looks.", "parameters": SCHEMA}}


TOOLS: list[Any] = [function("warmth"), function("wind")]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeCompletions]:
    with FakeCompletions("scripted:caller?text=plain", name="caller", takes_tools=True) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, server: FakeCompletions) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("tools")
    with (
        start_gateway(folder, "--log-conversations", str(folder / "logs")) as service,
        start_worker(folder, service, "caller", "--url", server.url, "--format", "chatml"),
        start_worker(folder, service, "scripted:plain?text=yes"),
    ):
        service.folder = folder  # type: ignore[attr-defined]
        yield service


@pytest.fixture
def client(gateway: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(gateway: Service) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)


def called(calls: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_a_chat_calls_functions_and_goes_on_with_what_they_gave(client: openai.OpenAI, server: FakeCompletions) -> None:
    options: dict[str, Any] = {"model": "caller", "tools": TOOLS, "seed": 4, "max_tokens": 50}
    answer = client.chat.completions.create(messages=ASKED, **options)
    message = answer.choices[0].message
    assert (answer.choices[0].finish_reason, message.content) == ("tool_calls", SAID)
    assert called(message.tool_calls) == [("warmth", ARGUED), ("wind", ARGUED)]
    sent = server.requests[-1]
    assert (sent["messages"], sent["tools"], sent["seed"], sent["max_tokens"]) == (ASKED, TOOLS, 4, 50)
    assert "tool_choice" not in sent
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 3 + 2 * 4 + 1)

    with client.chat.completions.stream(messages=ASKED, stream_options={"include_usage": True}, **options) as stream:
        streamed = stream.get_final_completion()
    assert called(streamed.choices[0].message.tool_calls) == called(message.tool_calls)
    assert (streamed.choices[0].message.content, streamed.choices[0].finish_reason) == (SAID, "tool_calls")
    assert (streamed.usage and streamed.usage.completion_tokens) == answer.usage.completion_tokens

    results = [{"role": "tool", "tool_call_id": call.id, "content": f"{n}°"} for n, call in enumerate(message.tool_calls or ())]
    told = [*ASKED, message.model_dump(exclude_none=True), *results]
    assert client.chat.completions.create(messages=told, **options).choices[0].message.content == "It is 0°, 1°. "
    assert [one["role"] for one in server.requests[-1]["messages"]] == ["system", "user", "assistant", "tool", "tool"]
    assert server.requests[-1]["messages"][2]["tool_calls"][1]["function"] == {"name": "wind", "arguments": "".join(ARGUMENTS)}


def test_how_functions_are_to_be_called_reaches_the_server(client: openai.OpenAI, server: FakeCompletions) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="caller", messages=ASKED, tools=TOOLS, **more).choices

    named = {"type": "function", "function": {"name": "wind"}}
    assert called(ask(tool_choice=named)[0].message.tool_calls) == [("wind", ARGUED)]
    assert server.requests[-1]["tool_choice"] == named
    assert called(ask(parallel_tool_calls=False)[0].message.tool_calls) == [("warmth", ARGUED)]
    (none,) = ask(tool_choice="none")
    assert (none.message.tool_calls, none.message.content, none.finish_reason) == (None, SAID, "stop")
    assert [len(choice.message.tool_calls) for choice in ask(n=2)] == [2, 2]
    (stopped,) = ask(stop="look")
    assert (stopped.message.content, stopped.message.tool_calls, stopped.finish_reason) == ("Let me ", None, "stop")
    (cut,) = ask(max_tokens=5)
    assert (called_names(cut), cut.finish_reason) == (["warmth"], "length")
    # Without functions the prompt is written here, as ever.
    assert client.chat.completions.create(model="caller", messages=ASKED).choices[0].message.content == "plain"
    assert "<|im_start|>user" in server.requests[-1]["prompt"]


def called_names(choice: Any) -> list[str]:
    return [call.function.name for call in choice.message.tool_calls]


def test_what_cannot_be_carried_out_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools is not carried out by the engine scripted of 'plain'") as refused:
        client.chat.completions.create(model="plain", messages=ASKED, tools=TOOLS)
    assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match=r"the function is wrong, says …") as wrong:
        client.chat.completions.create(model="caller", messages=ASKED, tools=[function("wrong")])
    assert (wrong.value.param, wrong.value.code) == ("tools", "invalid_value")
    begun = [*ASKED, {"role": "assistant", "content": "It"}]
    with pytest.raises(openai.BadRequestError, match="does not go on with a message of the assistant"):
        client.chat.completions.create(model="caller", messages=begun, tools=TOOLS)


def test_ids_are_for_those_who_know_them(client: openai.OpenAI) -> None:
    # This worker knows its server's model by name alone, and has no tokenizer of it.
    with pytest.raises(
        openai.BadRequestError, match="a prompt of token ids is not carried out by the engine openai"
    ) as refused:
        client.completions.create(model="caller", prompt=[1, 2])
    assert refused.value.param == "prompt"
    assert client.completions.create(model="caller", prompt=["a", "b"]).choices[1].text == "plain"


def test_messages_use_tools(claude: anthropic.Anthropic, server: FakeCompletions) -> None:
    tools: list[Any] = [{"name": name, "input_schema": SCHEMA} for name in ("warmth", "wind")]
    options: dict[str, Any] = {"model": "caller", "max_tokens": 50, "tools": tools, "system": "Be brief."}
    asked: list[Any] = [{"role": "user", "content": "How warm is it?"}]
    whole = claude.messages.create(messages=asked, **options)
    with claude.messages.stream(messages=asked, **options) as stream:
        streamed = stream.get_final_message()
    for answer in (whole, streamed):
        assert [block.type for block in answer.content] == ["text", "tool_use", "tool_use"]
        text, *uses = answer.content
        assert (text.text, answer.stop_reason) == (SAID, "tool_use")
        assert [(use.name, use.input) for use in uses] == [("warmth", ARGUED), ("wind", ARGUED)]
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (14, 12)
    assert server.requests[-1]["tools"][0]["function"] == {"name": "warmth", "parameters": SCHEMA}
    results = [
        {"type": "tool_result", "tool_use_id": whole.content[1].id, "content": "4°"},
        {
            "type": "tool_result",
            "tool_use_id": whole.content[2].id,
            "content": [{"type": "text", "text": "none"}],
            "is_error": True,
        },
    ]
    blocks = [block.model_dump(exclude_none=True) for block in whole.content]
    told = [*asked, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    last = claude.messages.create(messages=told, **options)
    assert (last.content[0].text, last.stop_reason) == ("It is 4°, Error: none. ", "end_turn")
    assert server.requests[-1]["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"place":"La Paz"}'

    claude.messages.create(messages=asked, tool_choice={"type": "any", "disable_parallel_tool_use": True}, **options)
    assert (server.requests[-1]["tool_choice"], server.requests[-1]["parallel_tool_calls"]) == ("required", False)
    with pytest.raises(anthropic.BadRequestError, match="which no tool_use before it has"):
        claude.messages.create(messages=[{"role": "user", "content": results}], **options)


def test_responses_call_functions(client: openai.OpenAI, server: FakeCompletions) -> None:
    tools: list[Any] = [{"type": "function", "name": name, "parameters": SCHEMA, "strict": True} for name in ("warmth", "wind")]
    options: dict[str, Any] = {"model": "caller", "tools": tools, "instructions": "Be brief."}
    whole = client.responses.create(input="How warm is it?", **options)
    with client.responses.stream(input="How warm is it?", **options) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    for answer in (whole, streamed):
        assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
        assert (answer.output_text, answer.status) == (SAID, "completed")
        assert [(call.name, json.loads(call.arguments)) for call in answer.output[1:]] == [("warmth", ARGUED), ("wind", ARGUED)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1, 2]
    assert whole.tools[0].name == "warmth"
    assert server.requests[-1]["tools"][0]["function"] == {"name": "warmth", "parameters": SCHEMA, "strict": True}
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "4°"} for call in whole.output[1:]]
    told: list[Any] = [{"role": "user", "content": "How warm is it?"}, *whole.output, *results]
    assert client.responses.create(input=told, **options).output_text == "It is 4°, 4°. "
    assert [one["role"] for one in server.requests[-1]["messages"]] == ["system", "user", "assistant", "tool", "tool"]
    client.responses.create(input="Hi", tool_choice={"type": "function", "name": "wind"}, **options)
    assert server.requests[-1]["tool_choice"] == {"type": "function", "function": {"name": "wind"}}
    with pytest.raises(openai.BadRequestError, match="which no function_call before it has"):
        client.responses.create(input=[told[0], *results], **options)


def lines_of(folder: Path) -> list[str]:
    return [line for file in folder.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_log_has_the_calls(client: openai.OpenAI, gateway: Service) -> None:
    asked: list[Any] = [{"role": "user", "content": "For the log."}]
    client.chat.completions.create(model="caller", messages=asked, tools=TOOLS[:1])
    folder: Path = gateway.folder / "logs"  # type: ignore[attr-defined]
    deadline_s = time.monotonic() + 5
    while not (
        found := [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines() if "For the log" in line]
    ):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    line = json.loads(found[0])
    assert line["finish_reason"] == "tool_calls"
    said = line["messages"][-1]
    assert (said["content"], said["tool_calls"][0]["function"]["name"]) == (SAID, "warmth")


async def test_a_client_that_leaves_stops_the_server(gateway: Service, server: FakeCompletions) -> None:
    client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    slow: list[Any] = [{"role": "user", "content": "gap_ms=200"}]
    stream = await client.chat.completions.create(model="caller", messages=slow, tools=TOOLS, stream=True)
    await anext(aiter(stream))
    before = server.cancelled
    await stream.close()
    deadline_s = time.monotonic() + 2
    while server.cancelled == before:
        assert time.monotonic() < deadline_s, "it goes on"
        await asyncio.sleep(0.02)


async def exhaust(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_an_answer_that_has_begun_does_not_begin_again(tmp_path: Path, server: FakeCompletions) -> None:
    slow: list[Any] = [{"role": "user", "content": "gap_ms=100"}]
    with (
        start_gateway(tmp_path, "--rejoin-wait", "0.3") as gateway,
        start_worker(tmp_path, gateway, "caller", "--url", server.url, "--format", "chatml") as first,
        start_worker(tmp_path, gateway, "caller", "--url", server.url, "--format", "chatml") as second,
    ):
        client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        stream = aiter(await client.chat.completions.create(model="caller", messages=slow, tools=TOOLS, stream=True))
        for _ in range(3):
            await anext(stream)
        first.kill()
        second.kill()
        with pytest.raises(openai.APIError, match="an answer with tools does not go on with another one") as lost:
            await exhaust(stream)
        assert lost.value.code == "worker_lost"


def test_vllm_s_worker_takes_them_where_its_server_does(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).touch()
    build_byte_backend().save(str(model / "tokenizer.json"))
    program = write_fake_vllm(tmp_path, "scripted:parrot?text=plain")
    options = ["--engine", "vllm", "--vllm-python", str(program), "--format", "chatml", "--"]
    with start_gateway(tmp_path) as gateway:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        with start_worker(tmp_path, gateway, str(model), *options, "--enable-auto-tool-choice") as worker:
            answer = client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS)
            assert called_names(answer.choices[0]) == ["warmth", "wind"]
            worker.stop()
        with start_worker(tmp_path, gateway, str(model), *options) as worker:
            wait_until(lambda: "worker ready" in worker.log, worker)
            with pytest.raises(openai.BadRequestError, match="not carried out by the engine vllm"):
                client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS)
