"""What holds in every dialect when workers die: real processes, real signals, official clients."""

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


EVERY: tuple[Ask, ...] = (whole_message, streamed_message, whole_response, streamed_response)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Service]:
    with start_gateway(tmp_path, "--rejoin-wait", "0.2", "--log-conversations", str(tmp_path / "logs")) as service:
        yield service


async def until_given_out(gateway: Service, count: int) -> None:
    """Wait until workers have `count` requests, each of them some."""
    deadline_s = time.monotonic() + 5
    given: list[Any] = []
    while sum(given) != count or not all(given):
        assert time.monotonic() < deadline_s, given
        await asyncio.sleep(0.02)
        given = [worker["outstanding"] for worker in await asyncio.to_thread(list_workers, gateway)]


def lines_of(folder: Path, count: int) -> list[dict[str, Any]]:
    """The log's lines, as soon as there are `count`."""
    deadline_s = time.monotonic() + 5
    while True:
        lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
        if len(lines) >= count:
            return lines
        assert time.monotonic() < deadline_s, lines
        time.sleep(0.02)


async def test_killing_one_of_two_workers_cuts_and_doubles_nothing(gateway: Service, tmp_path: Path) -> None:
    with (
        start_worker(tmp_path, gateway, f"scripted:twin{STEADY}") as first,
        start_worker(tmp_path, gateway, f"scripted:twin{STEADY}"),
    ):
        clients = Clients(gateway)
        asked = [(ask, f"question {number}") for number in range(4) for ask in EVERY]
        answers = asyncio.gather(*(ask(clients, "twin", text) for ask, text in asked))
        await until_given_out(gateway, 16)
        await asyncio.sleep(0.4)
        first.kill()
        disturbed = await answers
        undisturbed = await asyncio.gather(*(ask(clients, "twin", text) for ask, text in asked))
    assert disturbed == undisturbed
    assert {tokens for _, tokens in disturbed} == {40}
    # Asked for the same, all dialects say the same.
    assert len({text for text, _ in disturbed}) == 4


async def test_an_answer_that_is_lost_is_an_error_in_every_dialect(gateway: Service, tmp_path: Path) -> None:
    with start_worker(tmp_path, gateway, f"scripted:lone{STEADY}") as worker:
        clients = Clients(gateway)
        answers = asyncio.gather(*(ask(clients, "lone", "hello") for ask in EVERY), return_exceptions=True)
        await until_given_out(gateway, 4)
        await asyncio.sleep(0.4)
        worker.kill()
        message, in_stream, response, in_events = await answers
    for error in (message, in_stream, response, in_events):
        assert isinstance(error, anthropic.APIStatusError | openai.APIError)
        assert "worker of 'lone' was lost" in str(error)
    assert (message.status_code, message.type, message.error_code) == (503, "overloaded_error", "worker_lost")
    assert (in_stream.type, in_stream.error_code) == ("overloaded_error", "worker_lost")
    assert (response.status_code, response.code) == (503, "worker_lost")
    assert in_events.code == "worker_lost"
    lines = await asyncio.to_thread(lines_of, tmp_path / "logs", 4)
    assert [line["finish_reason"] for line in lines] == ["worker_lost"] * 4


async def test_answers_are_logged_in_every_dialect(gateway: Service, tmp_path: Path) -> None:
    with start_worker(tmp_path, gateway, "scripted:quick?tokens=5"):
        clients = Clients(gateway)
        answers = [await ask(clients, "quick", "hello") for ask in EVERY]
        lines = await asyncio.to_thread(lines_of, tmp_path / "logs", 4)
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answers[0][0]}]
    assert [(line["finish_reason"], line["messages"]) for line in lines] == [("stop", said)] * 4
    assert [line["id"].partition("_")[0] for line in lines] == ["msg", "msg", "resp", "resp"]
