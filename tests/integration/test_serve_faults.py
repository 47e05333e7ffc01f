"""What clients see when workers and gateways die: real processes, real signals."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from chaccu.testing.processes import Service, list_workers, start_gateway, start_worker

STEADY = "?tokens=60&tokens_per_s=40"


def client_of(gateway: Service) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def asking(model: str, text: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}]}


async def stream(client: openai.AsyncOpenAI, model: str, text: str, pieces: list[str] | None = None) -> tuple[str, int]:
    """The streamed answer and the completion tokens that its usage counts; `pieces` grows while it comes."""
    pieces = [] if pieces is None else pieces
    completion_tokens = -1
    options = {"include_usage": True}
    async for chunk in await client.chat.completions.create(**asking(model, text), stream=True, stream_options=options):
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
        if chunk.usage is not None:
            completion_tokens = chunk.usage.completion_tokens
    return "".join(pieces), completion_tokens


async def until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Wait for `condition`; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_a_lost_model_is_said_clearly_and_the_other_goes_on(tmp_path: Path) -> None:
    with (
        start_gateway(tmp_path, "--rejoin-wait", "0.5") as gateway,
        start_worker(tmp_path, gateway, "scripted:left" + STEADY) as left,
        start_worker(tmp_path, gateway, "scripted:right" + STEADY),
    ):
        client = client_of(gateway)
        seen: dict[str, list[str]] = {"left": [], "right": []}
        streams = {name: asyncio.create_task(stream(client, name, "hello", seen[name])) for name in seen}
        await until(lambda: all(len(pieces) > 5 for pieces in seen.values()), 5)
        left.kill()

        with pytest.raises(openai.APIError, match="worker of 'left' was lost") as in_stream:
            await streams["left"]
        assert in_stream.value.code == "worker_lost"
        assert len(seen["left"]) < 60

        began = time.monotonic()
        with pytest.raises(openai.InternalServerError, match=r"No worker serves 'left' now; waited 0\.5 s") as not_begun:
            await client.chat.completions.create(**asking("left", "hello"))
        assert not_begun.value.status_code == 503
        assert 0.5 <= time.monotonic() - began < 1.5
        assert "left" in [worker["model"] for worker in list_workers(gateway) if worker["state"] == "lost"]
        assert [model.id for model in (await client.models.list()).data] == ["right"]

        assert (await streams["right"])[1] == 60

        with start_worker(tmp_path, gateway, "scripted:left" + STEADY):
            began = time.monotonic()
            assert (await client.chat.completions.create(**asking("left", "hi"), max_tokens=2)).usage.completion_tokens == 2
            assert time.monotonic() - began < 2


@pytest.mark.parametrize("streamed", [True, False])
async def test_killing_one_of_two_workers_cuts_and_doubles_nothing(tmp_path: Path, streamed: bool) -> None:
    with (
        start_gateway(tmp_path) as gateway,
        start_worker(tmp_path, gateway, "scripted:twin" + STEADY) as first,
        start_worker(tmp_path, gateway, "scripted:twin" + STEADY),
    ):
        client = client_of(gateway)
        prompts = [f"question {index}" for index in range(32)]

        async def ask(prompt: str) -> tuple[str, int]:
            if streamed:
                return await stream(client, "twin", prompt)
            answer = await client.chat.completions.create(**asking("twin", prompt))
            return answer.choices[0].message.content, answer.usage.completion_tokens

        answers = asyncio.gather(*(ask(prompt) for prompt in prompts))

        def shares() -> list[Any]:
            return [worker["outstanding"] for worker in list_workers(gateway)]

        await until(lambda: sum(shares()) == 32 and min(shares()) > 5, 5)
        await asyncio.sleep(0.5)
        first.kill()
        disturbed = await answers
        assert {worker["state"] for worker in list_workers(gateway)} == {"ready", "lost"}
        undisturbed = await asyncio.gather(*(ask(prompt) for prompt in prompts))
        assert disturbed == undisturbed
        assert {tokens for _, tokens in disturbed} == {60}
        assert len({text for text, _ in disturbed}) == 32


async def test_each_of_several_choices_goes_on_with_its_logprobs(tmp_path: Path) -> None:
    async def ask(client: openai.AsyncOpenAI, came: list[int]) -> tuple[list[str], list[list[str]], int]:
        texts, told, completion_tokens = [""] * 4, [[], [], [], []], 0
        options = {"include_usage": True}
        asked = {**asking("twin", "hello"), "n": 4, "seed": 9, "logprobs": True}
        async for chunk in await client.chat.completions.create(**asked, stream=True, stream_options=options):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                told[choice.index] += [one.token for one in (choice.logprobs and choice.logprobs.content) or []]
                came[choice.index] += 1
            completion_tokens = chunk.usage.completion_tokens if chunk.usage else completion_tokens
        return texts, told, completion_tokens

    with (
        start_gateway(tmp_path) as gateway,
        start_worker(tmp_path, gateway, "scripted:twin" + STEADY) as first,
        start_worker(tmp_path, gateway, "scripted:twin" + STEADY),
    ):
        client, came = client_of(gateway), [0] * 4
        answer = asyncio.create_task(ask(client, came))
        await until(lambda: min(came) > 10, 5)
        assert min(worker["outstanding"] for worker in list_workers(gateway)) > 0
        first.kill()
        texts, told, completion_tokens = disturbed = await answer
        assert disturbed == await ask(client, [0] * 4)
        assert ["".join(tokens) for tokens in told] == texts
        assert (len(set(texts)), completion_tokens) == (4, 240)


async def test_the_answers_of_a_frozen_worker_go_on_elsewhere_and_it_comes_back(tmp_path: Path) -> None:
    with (
        start_gateway(tmp_path, "--stall-seconds", "1") as gateway,
        start_worker(tmp_path, gateway, "scripted:twin" + STEADY) as first,
        start_worker(tmp_path, gateway, "scripted:twin" + STEADY),
    ):
        client = client_of(gateway)
        prompts = [f"question {index}" for index in range(16)]
        arrivals: list[list[str]] = [[] for _ in prompts]
        answers = asyncio.gather(
            *(stream(client, "twin", prompt, pieces) for prompt, pieces in zip(prompts, arrivals, strict=True))
        )
        await until(lambda: all(len(pieces) > 5 for pieces in arrivals), 5)
        first.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(0.1)
            before = [len(pieces) for pieces in arrivals]
            moved_s = await until(lambda: all(len(p) > n for p, n in zip(arrivals, before, strict=True)), 5)
            assert 0.5 < moved_s < 2.5
            assert {worker["state"] for worker in list_workers(gateway)} == {"ready", "suspended"}
            disturbed = await answers
            assert (await client.chat.completions.create(**asking("twin", "and now?"))).usage.completion_tokens == 60
        finally:
            first.signal(signal.SIGCONT)
        await until(lambda: [(w["state"], w["outstanding"]) for w in list_workers(gateway)] == [("ready", 0)] * 2, 2)
        undisturbed = await asyncio.gather(*(stream(client, "twin", prompt) for prompt in prompts))
        assert disturbed == undisturbed
        assert {tokens for _, tokens in disturbed} == {60}


async def test_a_worker_that_reads_a_long_prompt_is_not_taken_for_frozen(tmp_path: Path) -> None:
    with (
        start_gateway(tmp_path, "--stall-seconds", "0.5") as gateway,
        start_worker(tmp_path, gateway, "scripted:slow?text=at last&first_token_s=2"),
    ):
        asked = client_of(gateway).chat.completions.create(**asking("slow", "a book"))
        answer, states = asyncio.create_task(asked), set()
        while not answer.done():
            states.add(list_workers(gateway)[0]["state"])
            await asyncio.sleep(0.05)
        assert (await answer).choices[0].message.content == "at last"
        assert states == {"ready"}


async def test_an_answer_that_is_slow_to_begin_is_asked_of_a_second_worker(tmp_path: Path) -> None:
    late = "?tokens=60&first_token_s=9"
    with (
        start_gateway(tmp_path) as gateway,
        start_worker(tmp_path, gateway, "scripted:twin?tokens=60"),
    ):
        client = client_of(gateway)
        await asyncio.gather(*(stream(client, "twin", f"question {index}") for index in range(30)))
        undisturbed = await stream(client, "twin", "hello")
        with await asyncio.to_thread(start_worker, tmp_path, gateway, "scripted:twin" + late, "--priority", "1"):
            began = time.monotonic()
            assert await stream(client, "twin", "hello") == undisturbed
            assert time.monotonic() - began < 2
            await until(lambda: all(worker["outstanding"] == 0 for worker in list_workers(gateway)), 1)
        async with httpx.AsyncClient() as http:
            metrics = (await http.get(f"{gateway.url}/metrics")).text
        assert 'chaccu_hedge_won_total{model="twin"} 1.0' in metrics


async def test_an_answer_waits_for_its_worker_to_come_back(tmp_path: Path) -> None:
    with start_gateway(tmp_path) as gateway, start_worker(tmp_path, gateway, "scripted:solo" + STEADY) as worker:
        client = client_of(gateway)
        undisturbed = await stream(client, "solo", "tell me")
        pieces: list[str] = []
        answer = asyncio.create_task(stream(client, "solo", "tell me", pieces))
        await until(lambda: len(pieces) > 10, 5)
        worker.kill()
        with await asyncio.to_thread(start_worker, tmp_path, gateway, "scripted:solo" + STEADY):
            assert await answer == undisturbed


async def test_workers_are_back_after_a_gateway_restart(tmp_path: Path) -> None:
    with start_gateway(tmp_path) as first:
        port = int(first.url.rpartition(":")[2])
        with start_worker(tmp_path, first, "scripted:a") as worker, start_worker(tmp_path, first, "scripted:b"):
            first.kill()
            await asyncio.sleep(1)
            with start_gateway(tmp_path, port=port) as second:
                assert await until(lambda: {w["model"] for w in list_workers(second)} == {"a", "b"}, 5) < 3
                answer = await client_of(second).chat.completions.create(**asking("a", "hi"), max_tokens=3)
                assert answer.usage.completion_tokens == 3
                assert "lost; trying again" in worker.log or "not reachable" in worker.log


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_stops_the_engine(tmp_path: Path, streamed: bool) -> None:
    slow = "scripted:slow?tokens=500&tokens_per_s=20&first_token_s=" + ("0" if streamed else "60")
    with start_gateway(tmp_path) as gateway, start_worker(tmp_path, gateway, slow):
        client = client_of(gateway)

        async def leave() -> float:
            """Ask, leave in the middle, and wait until the engine has stopped: a request is outstanding until then."""
            pieces: list[str] = []
            create = client.chat.completions.create
            asked = stream(client, "slow", "go on", pieces) if streamed else create(**asking("slow", "go on"))
            task = asyncio.create_task(asked)
            await until(lambda: bool(pieces) if streamed else list_workers(gateway)[0]["outstanding"] == 1, 5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return await until(lambda: list_workers(gateway)[0]["outstanding"] == 0, 2)

        # The quickest of three: the machine may be busy with something else.
        assert min([await leave() for _ in range(3)]) < 0.1


async def test_a_client_that_does_not_read_holds_up_nobody_and_fills_no_memory(tmp_path: Path) -> None:
    with (
        start_gateway(tmp_path) as gateway,
        start_worker(tmp_path, gateway, "scripted:long?tokens=45000&context_tokens=600000"),
    ):
        client = client_of(gateway)
        undisturbed = (await client.chat.completions.create(**asking("long", "a book"))).choices[0].message.content
        resident = resident_bytes(gateway)
        with await asyncio.to_thread(ask_and_read_nothing, gateway, {**asking("long", "a book"), "stream": True}) as slow:
            # Its worker is told to stop, long before it has written all.
            await asyncio.sleep(0.5)
            await until(lambda: list_workers(gateway)[0]["outstanding"] == 0, 20)
            began = time.monotonic()
            assert (
                await client.chat.completions.create(**asking("long", "a word"), max_tokens=20)
            ).usage.completion_tokens == 20
            assert time.monotonic() - began < 1
            assert resident_bytes(gateway) - resident < 30e6
            received = await asyncio.to_thread(slow.makefile("rb").read)
        events = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
        deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(deltas) == undisturbed
        async with httpx.AsyncClient() as http:
            assert "chaccu_paused_total{" in (await http.get(f"{gateway.url}/metrics")).text


def ask_and_read_nothing(gateway: Service, body: dict[str, Any]) -> socket.socket:
    """The connection of a client that has asked."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    slow.sendall(head.encode() + content)
    return slow


def resident_bytes(service: Service) -> int:
    status = Path(f"/proc/{service.pid}/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


async def test_a_worker_told_to_end_finishes_what_it_has(tmp_path: Path) -> None:
    with (
        start_gateway(tmp_path, "--rejoin-wait", "0.2") as gateway,
        start_worker(tmp_path, gateway, "scripted:old" + STEADY) as worker,
    ):
        client = client_of(gateway)
        pieces: list[str] = []
        answer = asyncio.create_task(stream(client, "old", "hello", pieces))
        await until(lambda: len(pieces) > 3, 5)
        worker.signal(signal.SIGTERM)
        await until(lambda: list_workers(gateway)[0]["state"] == "draining", 2)
        with pytest.raises(openai.InternalServerError, match="No worker serves 'old' now"):
            await client.chat.completions.create(**asking("old", "me too"))
        assert (await answer)[1] == 60
        assert worker.wait() == 0
        assert "drained and stopped" in worker.log


async def test_a_worker_that_may_not_finish_hands_over(tmp_path: Path) -> None:
    with (
        start_gateway(tmp_path) as gateway,
        start_worker(tmp_path, gateway, "scripted:twin" + STEADY, "--drain", "0") as first,
    ):
        client = client_of(gateway)
        undisturbed = await stream(client, "twin", "hello")
        pieces: list[str] = []
        answer = asyncio.create_task(stream(client, "twin", "hello", pieces))
        await until(lambda: len(pieces) > 3, 5)
        with await asyncio.to_thread(start_worker, tmp_path, gateway, "scripted:twin" + STEADY):
            assert first.stop() == 0
            assert await answer == undisturbed
