"""What holds in every dialect, when workers die and clients leave too: real processes, real signals, official clients."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from chaccu.testing.processes import Service, list_workers, start_gateway, start_worker

STEADY = "?tokens=40&tokens_per_s=40"
# An answer's text, and the tokens that its usage counts.
Said = tuple[str, int]
Ask = Callable[["Clients", str, str], Awaitable[Said]]


class Clients:
    """The official clients of one gateway."""

    def __init__(self, gateway: Service) -> None:
        self.openai = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        self.anthropic = anthropic.AsyncAnthropic(base_url=gateway.url, api_key="none", max_retries=0)


async def whole_chat(clients: Clients, model: str, text: str) -> Said:
    turns = [{"role": "user", "content": text}]
    answer = await clients.openai.chat.completions.create(model=model, messages=turns)
    return answer.choices[0].message.content, answer.usage.completion_tokens


async def streamed_chat(clients: Clients, model: str, text: str) -> Said:
    turns = [{"role": "user", "content": text}]
    options = {"include_usage": True}
    chunks = await clients.openai.chat.completions.create(model=model, messages=turns, stream=True, stream_options=options)
    *body, last = [chunk async for chunk in chunks]
    return "".join(chunk.choices[0].delta.content or "" for chunk in body), last.usage.completion_tokens


async def whole_message(clients: Clients, model: str, text: str) -> Said:
    turns = [{"role": "user", "content": text}]
    message = await clients.anthropic.messages.create(model=model, max_tokens=100, messages=turns)
    return message.content[0].text, message.usage.output_tokens


async def streamed_message(clients: Clients, model: str, text: str) -> Said:
    turns = [{"role": "user", "content": text}]
    async with clients.anthropic.messages.stream(model=model, max_tokens=100, messages=turns) as stream:
        said = "".join([piece async for piece in stream.text_stream])
        return said, (await stream.get_final_message()).usage.output_tokens


async def whole_response(clients: Clients, model: str, text: str) -> Said:
    response = await clients.openai.responses.create(model=model, input=text)
    return response.output_text, response.usage.output_tokens


async def streamed_response(clients: Clients, model: str, text: str) -> Said:
    pieces, numbers = [], []
    async for event in await clients.openai.responses.create(model=model, input=text, stream=True):
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            pieces.append(event.delta)
    assert numbers == list(range(len(numbers)))
    assert event.response.output_text == "".join(pieces)
    return "".join(pieces), event.response.usage.output_tokens


EVERY: tuple[Ask, ...] = (whole_chat, streamed_chat, whole_message, streamed_message, whole_response, streamed_response)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dialects")


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Service]:
    with start_gateway(folder, "--rejoin-wait", "0.2", "--log-conversations", str(folder / "logs")) as service:
        yield service


async def outstanding(gateway: Service, model: str) -> list[Any]:
    """How many requests each worker of `model` has."""
    return [worker["outstanding"] for worker in await asyncio.to_thread(list_workers, gateway) if worker["model"] == model]


async def until_given_out(gateway: Service, model: str, count: int) -> None:
    """Wait until the workers of `model` have `count` requests, each of them some."""
    deadline_s = time.monotonic() + 5
    given: list[Any] = []
    while sum(given) != count or not all(given):
        assert time.monotonic() < deadline_s, given
        await asyncio.sleep(0.02)
        given = await outstanding(gateway, model)


def logged(folder: Path, model: str) -> list[dict[str, Any]]:
    """The log's lines for `model`, as soon as there is one for each way of asking."""
    deadline_s = time.monotonic() + 5
    while True:
        text = "".join(path.read_text() for path in sorted((folder / "logs").glob("*.jsonl")))
        lines = [line for line in map(json.loads, text.splitlines()) if line["model"] == model]
        if len(lines) >= len(EVERY):
            return lines
        assert time.monotonic() < deadline_s, lines
        time.sleep(0.02)


async def test_killing_one_of_two_workers_cuts_and_doubles_nothing(gateway: Service, folder: Path) -> None:
    with (
        start_worker(folder, gateway, f"scripted:twin{STEADY}") as first,
        start_worker(folder, gateway, f"scripted:twin{STEADY}"),
    ):
        clients = Clients(gateway)
        asked = [(ask, f"question {number}") for number in range(3) for ask in EVERY]
        answers = asyncio.gather(*(ask(clients, "twin", text) for ask, text in asked))
        await until_given_out(gateway, "twin", len(asked))
        await asyncio.sleep(0.4)
        first.kill()
        disturbed = await answers
        undisturbed = await asyncio.gather(*(ask(clients, "twin", text) for ask, text in asked))
    assert disturbed == undisturbed
    assert {tokens for _, tokens in disturbed} == {40}
    # Asked for the same, all dialects say the same.
    assert len({text for text, _ in disturbed}) == 3


async def test_an_answer_that_is_lost_is_an_error_in_every_dialect(gateway: Service, folder: Path) -> None:
    with start_worker(folder, gateway, f"scripted:lone{STEADY}") as worker:
        clients = Clients(gateway)
        answers = asyncio.gather(*(ask(clients, "lone", "hello") for ask in EVERY), return_exceptions=True)
        await until_given_out(gateway, "lone", len(EVERY))
        await asyncio.sleep(0.4)
        worker.kill()
        errors = await answers
    for error in errors:
        assert isinstance(error, anthropic.APIStatusError | openai.APIError)
        assert "worker of 'lone' was lost" in str(error)
    chat, in_chunks, message, in_stream, response, in_events = errors
    assert (message.status_code, message.type, message.error_code) == (503, "overloaded_error", "worker_lost")
    assert (in_stream.type, in_stream.error_code) == ("overloaded_error", "worker_lost")
    assert {error.status_code for error in (chat, response)} == {503}
    assert {error.code for error in (chat, in_chunks, response, in_events)} == {"worker_lost"}
    lines = await asyncio.to_thread(logged, folder, "lone")
    assert [line["finish_reason"] for line in lines] == ["worker_lost"] * len(EVERY)


async def test_a_client_that_leaves_stops_the_engine_in_every_dialect(gateway: Service, folder: Path) -> None:
    with start_worker(folder, gateway, "scripted:slow?tokens=500&tokens_per_s=20"):
        clients = Clients(gateway)
        asked = [asyncio.create_task(ask(clients, "slow", f"{number}")) for number, ask in enumerate(EVERY)]
        await until_given_out(gateway, "slow", len(EVERY))
        await asyncio.sleep(0.3)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        began_s = time.monotonic()
        while await outstanding(gateway, "slow") != [0]:
            assert time.monotonic() - began_s < 0.5
            await asyncio.sleep(0.02)
    lines = await asyncio.to_thread(logged, folder, "slow")
    assert [line["finish_reason"] for line in lines] == ["cancelled"] * len(EVERY)


async def test_answers_are_logged_in_every_dialect(gateway: Service, folder: Path) -> None:
    with start_worker(folder, gateway, "scripted:quick?tokens=5"):
        clients = Clients(gateway)
        answers = [await ask(clients, "quick", "hello") for ask in EVERY]
        lines = await asyncio.to_thread(logged, folder, "quick")
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answers[0][0]}]
    assert [(line["finish_reason"], line["messages"]) for line in lines] == [("stop", said)] * len(EVERY)
    kinds = [line["id"].replace("-", "_").partition("_")[0] for line in lines]
    assert kinds == ["chatcmpl", "chatcmpl", "msg", "msg", "resp", "resp"]
