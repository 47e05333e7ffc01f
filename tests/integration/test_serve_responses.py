"""OpenAI's Responses of a real gateway with real workers, through the official client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import openai
import pytest

from chaccu.testing.processes import Service, start_gateway, start_worker

ANSWER = "One answer, naïve 🦙 and\nin two lines."


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("responses")
    with (
        start_gateway(folder, "--upstream", "gone=http://127.0.0.1:9/v1") as service,
        start_worker(folder, service, f"scripted:fixed?text={ANSWER}&context_tokens=200"),
        start_worker(folder, service, "scripted:mirror?echo=1"),
        start_worker(folder, service, "scripted:silent?text="),
    ):
        yield service


@pytest.fixture
def client(gateway: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, model: str = "fixed", **more: Any) -> Any:
    return client.responses.create(**{"model": model, "input": "Hi", **more})


def test_a_whole_answer(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.output_text == ANSWER
    assert (answer.status, answer.incomplete_details, answer.error, answer.model) == ("completed", None, None, "fixed")
    assert answer.usage.output_tokens == len(ANSWER.split())
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (answer.id[:5], answer.output[0].role, answer.output[0].status) == ("resp_", "assistant", "completed")
    # What is kept is said: nothing.
    assert answer.model_dump()["store"] is False


def test_a_streamed_answer(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fixed", input="Hi") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        streamed = stream.get_final_response()
    whole = ask(client)
    assert ("".join(texts), streamed.output_text) == (ANSWER, ANSWER)
    assert (streamed.usage, streamed.status) == (whole.usage, "completed")
    assert len(texts) > 5


@pytest.mark.parametrize("model", ["fixed", "silent"])
def test_the_events_of_a_stream_are_in_their_order(client: openai.OpenAI, model: str) -> None:
    events = list(ask(client, model, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds == [*begin, *["output_text.delta"] * (len(kinds) - 8), *end]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-4].text == events[-1].response.output_text == (ANSWER if model == "fixed" else "")
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_at_its_limit_is_incomplete(client: openai.OpenAI, streamed: bool) -> None:
    answer = ask(client, max_output_tokens=2, stream=streamed)
    if streamed:
        *_, last = answer
        assert last.type == "response.incomplete"
        answer = last.response
    assert (answer.output_text, answer.status, answer.incomplete_details.reason) == (
        "One answer,",
        "incomplete",
        "max_output_tokens",
    )
    assert (answer.output[0].status, answer.max_output_tokens) == ("incomplete", 2)


def test_what_was_asked_for_is_told(client: openai.OpenAI) -> None:
    answer = ask(
        client,
        instructions="Be brief.",
        temperature=0.5,
        top_p=0.9,
        metadata={"run": "7"},
        user="someone",
        store=False,
        tools=[],
        tool_choice="none",
        truncation="disabled",
        text={"format": {"type": "text"}},
    )
    assert (answer.instructions, answer.temperature, answer.top_p) == ("Be brief.", 0.5, 0.9)
    assert (answer.metadata, answer.user, answer.tool_choice) == ({"run": "7"}, "someone", "none")


def test_instructions_items_and_an_earlier_answer(client: openai.OpenAI) -> None:
    def said(**more: Any) -> str:
        return str(ask(client, "mirror", **more).output_text)

    plain = said(instructions="Be brief.", input="one two")
    assert "Be brief." in plain
    assert "one two" in plain
    parts = [{"type": "input_text", "text": "one "}, {"type": "input_text", "text": "two"}]
    assert said(instructions="Be brief.", input=[{"role": "user", "content": parts}]) == plain
    assert said(input=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "one two"}]) == plain
    first = ask(client)
    again = said(input=[{"role": "user", "content": "Hi"}, *first.output, {"role": "user", "content": "More"}])
    assert ANSWER in again


CALLED_NOT = {"type": "function_call_output", "call_id": "x", "output": "y"}
WRONG: dict[str, tuple[dict[str, Any] | str, int, str | None, str]] = {
    "no JSON": ("{", 400, None, "no valid JSON"),
    "no input": ({"input": None}, 400, "input", "missing"),
    "empty input": ({"input": []}, 400, "input", "length"),
    "far model": ({"model": "fixd"}, 404, "model", "did you mean 'fixed'?"),
    "hot": ({"temperature": 9}, 400, "temperature", "temperature = 9"),
    "no tokens": ({"max_output_tokens": 0}, 400, "max_output_tokens", ">= 1"),
    "store": ({"store": True}, 400, "store", "keeps no answers"),
    "an earlier answer": ({"previous_response_id": "resp_1"}, 400, "previous_response_id", "send the whole conversation"),
    "background": ({"background": True}, 400, "background", "keeps no answers"),
    "tools": ({"tools": [{"type": "web_search"}]}, 400, "tools", "tools[0].type = 'web_search'"),
    "a function": (
        {"tools": [{"type": "function", "name": "f"}]},
        400,
        "tools",
        "tools is not carried out by the engine scripted",
    ),
    "no schema": ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format.schema", "missing"),
    "a form": ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type", "xml"),
    "JSON": ({"text": {"format": {"type": "json_object"}}}, 400, "text.format", "text.format is not carried out by the engine"),
    "truncation": ({"truncation": "auto"}, 400, "truncation", "not supported"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        400,
        "input",
        "input[0].content[0].type = 'input_image'",
    ),
    "a call's output": ({"input": [CALLED_NOT]}, 400, "input", "which no function_call before it has"),
    "half an output": ({"input": [{"type": "function_call_output"}]}, 400, "input", "call_id' is missing"),
    "a thought": (
        {"input": [{"type": "reasoning"}]},
        400,
        "input",
        "the types are: message, function_call, function_call_output",
    ),
    "an alien role": ({"input": [{"role": "alien", "content": "Hi"}]}, 400, "input", "alien"),
    "instructions alone": ({"input": [{"role": "system", "content": "Be brief."}]}, 400, "input", "no messages"),
    "chat's max_tokens": ({"max_tokens": 9}, 400, "max_tokens", "no parameter of this request"),
    "long prompt": ({"input": "x" * 500}, 400, "input", "context holds 200"),
    "an upstream": ({"model": "gone"}, 400, "model", "/v1/chat/completions"),
    "much metadata": ({"metadata": {"k": "x" * 600}}, 400, "metadata", "512"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("streamed", [False, True])
async def test_wrong_requests_get_openai_errors(http: aiohttp.ClientSession, case: str, streamed: bool) -> None:
    given, status, param, text = WRONG[case]
    if isinstance(given, dict):
        whole = {"model": "fixed", "input": "Hi", "stream": streamed, **given}
        given = json.dumps({name: value for name, value in whole.items() if value is not None})
    async with http.post("/v1/responses", data=given) as response:
        error = (await response.json())["error"]
    assert response.status == status, error
    assert (error["param"] or "").partition("[")[0] == (param or "")
    assert text in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "`" not in error["message"]
