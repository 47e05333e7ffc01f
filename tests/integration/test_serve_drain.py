"""A gateway that is told to end answers what it has, takes nothing new, and ends; told again, it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from counting_upstream import Upstream, answer

from chaccu.testing.processes import Service, start_gateway, start_serve, start_worker

TOKENS = 30
SLOW = f"scripted:slow?tokens={TOKENS}&tokens_per_s=20"
PROMPT = "question gap_ms=50"
MODELS = ("slow", "up")


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Service]:
    """A gateway with a worker and an upstream, each of which takes a second and a half to answer."""
    with (
        Upstream() as upstream,
        start_gateway(folder, "--upstream", f"up={upstream.url}", *options) as gateway,
        start_worker(folder, gateway, SLOW),
    ):
        yield gateway


class Client:
    """Has asked for a stream of each of `models`, and has the beginnings."""

    def __init__(self, gateway: Service, models: tuple[str, ...] = MODELS) -> None:
        self._client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        self.texts = dict.fromkeys(models, "")
        self.finished: dict[str, str] = {}
        self._begun = asyncio.Event()
        self._streams = [asyncio.create_task(self._stream(model)) for model in models]

    async def _stream(self, model: str) -> None:
        stream = await self.ask(model, stream=True)
        async for event in stream:
            self.texts[model] += event.choices[0].delta.content or ""
            if all(self.texts.values()):
                self._begun.set()
            if event.choices[0].finish_reason:
                self.finished[model] = event.choices[0].finish_reason

    async def ask(self, model: str, *, stream: bool = False):  # type: ignore[no-untyped-def]
        messages = [{"role": "user", "content": PROMPT}]
        return await self._client.chat.completions.create(model=model, messages=messages, stream=stream, max_tokens=TOKENS)  # type: ignore[call-overload]

    async def begun(self) -> None:
        await asyncio.wait_for(self._begun.wait(), 5)

    async def ended(self) -> list[BaseException | None]:
        return await asyncio.gather(*self._streams, return_exceptions=True)


async def ready(gateway: Service) -> int:
    def ask() -> int:
        try:
            with urllib.request.urlopen(f"{gateway.url}/ready", timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    return await asyncio.to_thread(ask)


async def test_what_is_under_way_is_answered_and_nothing_new_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway:
        undisturbed = Client(gateway)
        assert await undisturbed.ended() == [None, None]
        client = Client(gateway)
        await client.begun()
        assert await ready(gateway) == 200
        gateway.signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert await ready(gateway) == 503
        for model in MODELS:
            with pytest.raises(openai.InternalServerError) as refused:
                await client.ask(model)
            assert (refused.value.status_code, refused.value.code) == (503, "draining")
            assert refused.value.response.headers["retry-after"]
        assert not client.finished
        assert await client.ended() == [None, None]
        assert (client.texts, client.finished) == (undisturbed.texts, undisturbed.finished)
        assert client.texts["up"] == answer(PROMPT, TOKENS)
        began = time.monotonic()
        assert await asyncio.to_thread(gateway.wait) == 0
        assert time.monotonic() - began < 2
        assert "gateway ends once it has answered 2 requests, in 30 s at most" in gateway.log


@pytest.mark.parametrize("again", [False, True])
async def test_what_takes_longer_than_it_may_is_broken_off(tmp_path: Path, again: bool) -> None:
    with serving(tmp_path, "--drain", "30" if again else "0.5") as gateway:
        client = Client(gateway)
        await client.begun()
        gateway.signal(signal.SIGTERM)
        began = time.monotonic()
        if again:
            await asyncio.sleep(0.3)
            gateway.signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.wait) == 0
        assert 0.25 < time.monotonic() - began < 1.4
        assert all(isinstance(error, Exception) for error in await client.ended())
        assert not client.finished


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_answers_what_is_under_way_and_ends_at_once_on_a_second_signal(tmp_path: Path, number: int) -> None:
    with start_serve(tmp_path, SLOW) as serve:
        client = Client(serve, ("slow",))
        await client.begun()
        serve.signal(number)
        if number == signal.SIGTERM:
            assert await client.ended() == [None]
            assert client.finished == {"slow": "stop"}
        else:
            await asyncio.sleep(0.3)
            serve.signal(number)
        began = time.monotonic()
        assert await asyncio.to_thread(serve.wait) == 130
        assert time.monotonic() - began < 2
        await client.ended()
