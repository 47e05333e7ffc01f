"""Clients that ask too much of a real gateway: of its room, its time, its connections."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.processes import Service, start_gateway, start_worker

CONNECTIONS = 6


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Takes six connections and answers within a second; its worker and its upstream need more for all but one word."""
    folder = tmp_path_factory.mktemp("limits")
    words = "one two three four five six seven eight"
    with FakeOpenAI({"up": FakeModel(answer=words, delay_s=0.4), "silent": FakeModel(failure="silent")}) as upstream:
        arguments = [f"--upstream={name}={upstream.url}/v1" for name in ("up", "silent")]
        arguments += ["--alias", "other=up", "--max-connections", str(CONNECTIONS), "--request-seconds", "1"]
        with (
            start_gateway(folder, *arguments, "--log-format", "json") as service,
            start_worker(folder, service, f"scripted:slow?text={words.replace(' ', '%20')}&tokens_per_s=2.5"),
        ):
            yield service


@asynccontextmanager
async def connected(gateway: Service) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def ask(gateway: Service, fields: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    """All that is answered until the connection closes."""
    async with connected(gateway) as (reader, writer):
        body = json.dumps(fields).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        return await asyncio.wait_for(reader.read(), 10)


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **more}


@pytest.mark.parametrize("model", ["slow", "up"])
async def test_a_stream_that_takes_too_long_ends_with_an_event(gateway: Service, model: str) -> None:
    answer = await ask(gateway, chat(model, stream=True))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"one" in answer
    events = re.findall(rb"data: (.*)\n", answer)
    assert json.loads(events[-1])["error"]["code"] == "answer_timeout"
    assert answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("model", ["slow", "silent"])
async def test_an_answer_that_takes_too_long_is_an_error(gateway: Service, model: str) -> None:
    answer = await ask(gateway, chat(model, stream=model == "silent"))
    if model == "silent" and answer.startswith(b"HTTP/1.1 200"):
        # Its head came in time.
        assert b"answer_timeout" in answer
        return
    assert answer.startswith(b"HTTP/1.1 504")
    assert b'"code":"answer_timeout"' in answer


async def test_beside_the_fast_path_a_response_that_takes_too_long_has_no_end(gateway: Service) -> None:
    answer = await ask(gateway, chat("other", stream=True))
    assert b"one" in answer
    assert not answer.endswith(b"0\r\n\r\n")
    assert "answer_timeout" in gateway.log


@pytest.mark.parametrize("pieces", [1, 66])
async def test_a_head_without_end_is_refused(gateway: Service, pieces: int) -> None:
    async with connected(gateway) as (reader, writer):
        lines = b"x-a: 1\r\n" * 201 + b"\r\n" if pieces == 1 else b"x-a: " + b"1" * 1000
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        for _ in range(pieces):
            writer.write(lines)
            await asyncio.sleep(0.002)
        answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 431")
    assert b"headers_too_large" in answer


async def test_more_connections_than_allowed_are_turned_away(gateway: Service) -> None:
    held = [connected(gateway) for _ in range(CONNECTIONS)]
    for one in held:
        await one.__aenter__()
    await asyncio.sleep(0.1)
    async with connected(gateway) as (reader, _):
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"too_many_connections" in answer
        assert b"x-request-id: req-" in answer
    await held.pop().__aexit__(None, None, None)
    await asyncio.sleep(0.1)
    assert (await ask(gateway, chat("nobody"))).startswith(b"HTTP/1.1 404")
    for one in held:
        await one.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("path", "model", "name"),
    [
        ("/v1/chat/completions", "slow", "messages"),
        ("/v1/chat/completions", "up", "messages"),
        ("/v1/messages", "slow", "messages"),
        ("/v1/responses", "slow", "input"),
    ],
)
async def test_more_messages_than_any_conversation_has_are_refused(gateway: Service, path: str, model: str, name: str) -> None:
    many = [{"role": "user", "content": "a"}] * 10_001
    limit = {"max_tokens": 1} if path == "/v1/messages" else {}
    answer = await ask(gateway, {"model": model, name: many, **limit}, path)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"10000" in answer
