"""What a gateway logs, with real processes, and what `chaccu data clean` makes of it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from chaccu.data.records import read_conversations
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.processes import Service, start_command, start_gateway, start_serve, start_worker, wait_until

SLOW = "scripted:slow?tokens=400&tokens_per_s=40"
ECHO = "scripted:words?tokens=40"


def client_of(gateway: Service) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-very-secret", max_retries=0)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def ask(client: openai.AsyncOpenAI, messages: list[dict[str, Any]], model: str = "words", **more: Any) -> str:
    answer = await client.chat.completions.create(model=model, messages=messages, **more)
    return answer.choices[0].message.content


async def stream(client: openai.AsyncOpenAI, messages: list[dict[str, Any]], model: str = "words", **more: Any) -> str:
    chunks = await client.chat.completions.create(model=model, messages=messages, stream=True, **more)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])


async def leave(client: openai.AsyncOpenAI, messages: list[dict[str, Any]], model: str = "slow", pieces: int = 5) -> str:
    """Hang up after some pieces; what was seen."""
    chunks = await client.chat.completions.create(model=model, messages=messages, stream=True)
    seen: list[str] = []
    async for chunk in chunks:
        seen.append(chunk.choices[0].delta.content or "")
        if len(seen) > pieces:
            break
    await chunks.close()
    return "".join(seen)


def lost_answers(gateway: Service) -> int:
    with urllib.request.urlopen(f"{gateway.url}/metrics", timeout=5) as response:
        found = re.search(r'^chaccu_logged_answers_total{result="lost"} (\d+)', response.read().decode(), re.MULTILINE)
    return int(found[1]) if found else 0


def lines_of(folder: Path, count: int) -> list[dict[str, Any]]:
    """The log's lines, as soon as there are `count`; one that is being written is none yet."""
    deadline_s = time.monotonic() + 5
    while True:
        texts = [path.read_bytes().rpartition(b"\n")[0] for path in sorted(folder.glob("*.jsonl"))]
        found = [json.loads(line) for text in texts for line in text.splitlines()]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline_s, found
        time.sleep(0.02)


async def test_a_log_becomes_a_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    with (
        FakeOpenAI(
            {"up": FakeModel(answer="An answer from upstream, which knows a good deal of rivers and lakes.")}
        ) as upstream,
        start_gateway(
            tmp_path, "--log-conversations", str(folder), "--upstream", f"up={upstream.url}/v1", "--rejoin-wait", "0.2"
        ) as gateway,
        start_worker(tmp_path, gateway, ECHO),
        start_worker(tmp_path, gateway, SLOW) as slow,
    ):
        client = client_of(gateway)
        assert "conversations are logged in" in gateway.log

        talk: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, user("What is a vicuña?")]
        talk += [{"role": "assistant", "content": await ask(client, talk, user="someone")}, user("And a guanaco?")]
        talk += [{"role": "assistant", "content": await stream(client, talk)}, user("And an alpaca?")]
        talk += [{"role": "assistant", "content": await stream(client, talk, stream_options={"include_usage": True})}]
        short = await ask(client, [user("Tell me a long story.")], max_tokens=5)
        seen = await leave(client, [user("What do they eat?")])
        await asyncio.to_thread(lines_of, folder, 5)
        after = [user("What do they eat?"), {"role": "assistant", "content": seen}, user("Never mind. What do they drink?")]
        drunk = await ask(client, after)
        relayed = [user("Name a river."), {"role": "assistant", "content": await stream(client, [user("Name a river.")], "up")}]
        further = await ask(client, [*relayed, user("And a lake?")], "up")
        await client.completions.create(model="words", prompt="no conversation")
        with pytest.raises(openai.BadRequestError):
            await ask(client, [user("too hot")], temperature=9)
        with pytest.raises(openai.NotFoundError):
            await ask(client, [user("nobody")], "nobody")
        broken = asyncio.create_task(stream(client, [user("Until the worker dies.")], "slow"))
        await asyncio.sleep(1)
        slow.kill()
        with pytest.raises(openai.APIError, match="was lost"):
            await broken
        lines = await asyncio.to_thread(lines_of, folder, 9)

    assert [line["finish_reason"] for line in lines] == [
        *["stop"] * 3,
        "length",
        "cancelled",
        *["stop"] * 3,
        "worker_lost",
    ]
    assert lines[2]["messages"] == talk[1:]
    assert [line["messages"][-1]["content"] for line in lines[3:4] + lines[5:6]] == [short, drunk]
    assert lines[4]["messages"][-1]["content"].startswith(seen)
    assert lines[7]["messages"] == [*relayed, user("And a lake?"), {"role": "assistant", "content": further}]
    assert [line.get("user") for line in lines] == ["someone", *[None] * 8]
    assert {line.get("system") for line in lines[:3]} == {"Be brief."}
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert "secret" not in file.read_text()

    out = tmp_path / "out"
    cleaned = start_command(tmp_path, ["data", "clean", *map(str, folder.glob("*.jsonl")), "--out", str(out), "--json"])
    assert cleaned.wait(60) == 0, cleaned.log
    report = json.loads(cleaned.log[cleaned.log.index("{") :])
    assert report["dropped"]["read"] == {
        "beginning of a later conversation": 3,
        "answer was cut off (length)": 1,
        "answer was cut off (cancelled)": 1,
        "answer was cut off (worker_lost)": 1,
    }
    kept = [one for name in ("train.jsonl", "validation.jsonl") for one in read_conversations(out / name)]
    asked = {one.messages[0].content: one for one in kept}
    assert len(kept) == 3
    assert [message.content for message in asked["What is a vicuña?"].messages] == [turn["content"] for turn in talk[1:]]
    assert asked["What is a vicuña?"].system == "Be brief."
    assert [message.content for message in asked["Never mind. What do they drink?"].messages] == [after[-1]["content"], drunk]
    assert len(asked["Name a river."].messages) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_is_under_way_at_the_end_is_logged(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "logs"
    with start_serve(tmp_path, ECHO, SLOW, "--log-conversations", str(folder), "--drain", "0") as serve:
        client = client_of(serve)
        whole = await asyncio.gather(*(ask(client, [user(f"question {n}")]) for n in range(50)))
        broken = asyncio.create_task(stream(client, [user("go on")], "slow"))
        await asyncio.sleep(0.5)
        serve.signal(number)
        # The client may see the end as an error, or as a stream that is short.
        await asyncio.gather(broken, return_exceptions=True)
        await asyncio.to_thread(serve.wait)
    lines = await asyncio.to_thread(lines_of, folder, 51)
    assert sorted(line["messages"][-1]["content"] for line in lines if line["finish_reason"] == "stop") == sorted(whole)
    (last,) = [line for line in lines if line["model"] == "slow"]
    assert last["finish_reason"] in ("cancelled", "worker_lost")


async def test_a_log_that_cannot_be_written_any_more_does_not_stop_serving(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    with start_gateway(tmp_path, "--log-conversations", str(folder)) as gateway, start_worker(tmp_path, gateway, ECHO):
        client = client_of(gateway)
        await ask(client, [user("one")])
        await asyncio.to_thread(lines_of, folder, 1)
        folder.rename(tmp_path / "away")
        for number in range(3):
            await ask(client, [user(f"lost {number}")])
        # The thread that writes has met the missing folder each time.
        await asyncio.to_thread(wait_until, lambda: lost_answers(gateway) == 3, gateway, timeout_s=5)
        (tmp_path / "away").rename(folder)
        await ask(client, [user("four")])
        lines = await asyncio.to_thread(lines_of, folder, 2)
        assert [line["messages"][0]["content"] for line in lines] == ["one", "four"]
        assert gateway.stop() == 0
    assert gateway.log.count("conversations are not logged now") == 1
    assert "3 answers are missing in the conversation log" in gateway.log


@pytest.mark.parametrize("command", [["gateway"], ["serve", "scripted:a"]])
def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    service = start_command(tmp_path, [*command, "--port", "0", "--log-conversations", str(tmp_path / "file")])
    assert service.wait() == 1
    assert service.log == (
        f"chaccu: conversations cannot be logged in {tmp_path / 'file'}: File exists.\n"
        "  try: --log-conversations with a folder that you may write to\n"
    )


def test_nothing_is_logged_unless_asked_for(tmp_path: Path) -> None:
    with start_gateway(tmp_path) as gateway, start_worker(tmp_path, gateway, ECHO):
        asyncio.run(ask(client_of(gateway), [user("well?")]))
        assert not list(tmp_path.rglob("*.jsonl"))
