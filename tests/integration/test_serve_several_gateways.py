"""Two real gateways and one worker of both: its slots are shared, and one gateway's end leaves the other's answers alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import openai

from chaccu.testing.processes import Service, list_workers, start_command, start_gateway, start_worker, wait_until


async def until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)


async def stream(gateway: Service, pieces: list[str]) -> None:
    client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    async for chunk in await client.completions.create(model="m", prompt="hello", max_tokens=200, stream=True):
        pieces.append(chunk.choices[0].text)


def seen(gateway: Service) -> list[tuple[object, object]]:
    return [(worker["outstanding"], worker["elsewhere"]) for worker in list_workers(gateway) if worker["state"] == "ready"]


async def test_one_worker_serves_two_gateways_and_each_sees_what_is_free(tmp_path: Path) -> None:
    model = "scripted:m?tokens=90&tokens_per_s=45&slots=4"
    with (
        start_gateway(tmp_path) as left,
        start_gateway(tmp_path) as right,
        start_worker(tmp_path, left, model, "--gateway", right.url) as worker,
    ):
        await until(lambda: seen(left) == seen(right) == [(0, 0)])
        texts: list[list[str]] = [[], [], []]
        tasks = [asyncio.create_task(stream(gateway, text)) for gateway, text in zip((left, left, right), texts, strict=True)]
        await until(lambda: (seen(left), seen(right)) == ([(2, 1)], [(1, 2)]))
        await until(lambda: all(len(text) > 3 for text in texts))
        left.kill()
        await tasks[2]
        assert len("".join(texts[2]).split()) == 90
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        await until(lambda: seen(right) == [(0, 0)])
        assert worker.exit_code is None
        again = start_gateway(tmp_path, port=int(left.url.rpartition(":")[2]))
        with again:
            await until(lambda: seen(again) == [(0, 0)])
            assert worker.stop() == 0
            assert "drained and stopped" in worker.log


async def test_a_gateway_with_a_long_queue_leaves_the_other_its_part(tmp_path: Path) -> None:
    model = "scripted:m?tokens=20&tokens_per_s=40&slots=2"
    with (
        start_gateway(tmp_path) as left,
        start_gateway(tmp_path) as right,
        start_worker(tmp_path, left, model, "--gateway", right.url),
    ):
        await until(lambda: seen(left) == seen(right) == [(0, 0)])
        crowd = [asyncio.create_task(stream(left, [])) for _ in range(12)]
        await until(lambda: seen(right) == [(0, 2)])
        # It is before those that wait on the left, though no slot is free when it comes.
        await stream(right, [])
        assert sum(task.done() for task in crowd) <= 6
        await asyncio.gather(*crowd)
        await until(lambda: seen(left) == seen(right) == [(0, 0)])


def test_every_address_of_a_name_is_joined(tmp_path: Path) -> None:
    with start_gateway(tmp_path) as gateway:
        by_name = gateway.url.replace("http://127.0.0.1", "dns+http://localhost")
        with start_command(tmp_path, ["worker", "--model", "scripted:m", "--gateway", by_name]) as worker:
            wait_until(lambda: "worker ready" in worker.log, worker)
            assert "(127.0.0.1)" in worker.log
