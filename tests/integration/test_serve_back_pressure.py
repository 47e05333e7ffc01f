"""A real gateway with more requests than its one worker can answer at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.testing.processes import start_gateway, start_worker


async def ask(url: str, key: str = "none") -> str | None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        answer = await client.chat.completions.create(model="slow", messages=[{"role": "user", "content": "Hi"}])
    return answer.choices[0].message.content


async def test_what_is_beyond_the_queue_gets_429_and_what_waits_is_answered(tmp_path: Path) -> None:
    with (
        start_gateway(tmp_path, "--queue-size", "2") as gateway,
        start_worker(tmp_path, gateway, "scripted:slow?text=a b c&tokens_per_s=6&slots=1"),
    ):
        answers = await asyncio.gather(*(ask(gateway.url) for _ in range(5)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
        assert answers.count("a b c") == 3
        assert [error.code for error in refused] == ["queue_full"] * 2
        assert int(refused[0].response.headers["retry-after"]) >= 1
        assert await ask(gateway.url) == "a b c"


async def test_a_wait_has_an_end(tmp_path: Path) -> None:
    with (
        start_gateway(tmp_path, "--queue-seconds", "0.3") as gateway,
        start_worker(tmp_path, gateway, "scripted:slow?text=a b c&tokens_per_s=3&slots=1"),
    ):
        first = asyncio.create_task(ask(gateway.url))
        await asyncio.sleep(0.2)
        with pytest.raises(openai.RateLimitError, match=r"waited 0\.3 s"):
            await ask(gateway.url)
        assert await first == "a b c"


async def test_keys_take_turns(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    many, few = (file.create(name)[0] for name in ("many", "few"))
    with (
        start_gateway(tmp_path, "--keys", str(file.path), "--join-token", "t") as gateway,
        start_worker(tmp_path, gateway, "scripted:slow?text=a&first_token_s=0.2&slots=1", "--join-token", "t"),
    ):
        crowd = [asyncio.create_task(ask(gateway.url, many)) for _ in range(8)]
        await asyncio.sleep(0.4)
        assert await ask(gateway.url, few) == "a"
        assert sum(task.done() for task in crowd) <= 5
        assert await asyncio.gather(*crowd) == ["a"] * 8
