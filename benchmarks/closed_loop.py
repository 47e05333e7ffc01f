"""Clients that each ask the next question when their last is answered, and what they found: tokens a second, first tokens.

Whom they ask is a function, so an engine in this process and a server are measured by the same loop.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import aiohttp

# The pieces of the answer to a question: how many tokens each accounts for; the first is the first text.
Pieces = AsyncGenerator[int, None]


@dataclass(frozen=True)
class Load:
    """What all clients got: tokens in `seconds`, and for each question the seconds until the first text."""

    tokens: int
    seconds: float
    waits_s: list[float]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


async def ask_in_turn(ask: Callable[[int], Pieces], *, clients: int, questions: Iterable[int]) -> Load:
    """Let `clients` ask the questions, by their numbers."""
    numbers, tokens = iter(questions), 0
    waits: list[float] = []

    async def client() -> None:
        nonlocal tokens
        for number in numbers:
            begun, first = time.perf_counter(), None
            async with aclosing(ask(number)) as pieces:
                async for piece in pieces:
                    first = first or time.perf_counter()
                    tokens += piece
            waits.append((first or time.perf_counter()) - begun)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return Load(tokens, time.perf_counter() - begun, waits)


async def ask_server(session: aiohttp.ClientSession, url: str, body: dict[str, Any], headers: dict[str, str]) -> Pieces:
    """The answer of an OpenAI-compatible server; its tokens are those of its usage, in the last piece."""
    async with session.post(url, json=body, headers=headers) as answer:
        answer.raise_for_status()
        if not body.get("stream"):
            yield (await answer.json())["usage"]["completion_tokens"]
            return
        async for line in answer.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(f"the stream ended with an error: {chunk['error']}")
                yield (chunk.get("usage") or {}).get("completion_tokens", 0)


def open_session() -> aiohttp.ClientSession:
    """Without limits. llama.cpp breaks a connection that is kept after a stream, so none is."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), connector=connector)


async def measure_levels(
    ask: Callable[[int, int], Pieces], levels: Sequence[int], *, max_tokens: int
) -> AsyncGenerator[dict[str, Any], None]:
    """Figures at each number of clients, two questions a client and four at least, after short ones that warm up. `ask` is
    given a question's number, no two alike, and how many tokens to answer with. Raises `RuntimeError` for an answer that is
    not as long as was asked for."""
    number = 0
    for clients in levels:
        count = max(4, 2 * clients)
        for questions, length in ((clients, 8), (count, max_tokens)):
            load = await ask_in_turn(
                lambda one, length=length: ask(one, length), clients=clients, questions=range(number, number + questions)
            )
            number += questions
            if load.tokens != questions * length:
                raise RuntimeError(f"{questions} answers of {length} tokens had {load.tokens} in all")
        cuts = statistics.quantiles(load.waits_s, n=100, method="inclusive")
        yield {
            "clients": clients,
            "questions": count,
            "tokens": load.tokens,
            "seconds": round(load.seconds, 3),
            "tokens_per_s": round(load.tokens_per_s, 1),
            "ttft_p50_ms": round(1e3 * cuts[49], 1),
            "ttft_p99_ms": round(1e3 * cuts[98], 1),
        }
