"""An OpenAI-compatible server whose answers can be checked to the letter: token k is a function of the prompt and of k.

As a program it prints its port and serves until it is killed. It goes on with a last message of the assistant that
`continue_final_message` names, spaces at its end cut off, as templates do; any other request it answers from its beginning.
Some tokens are line breaks alone. A prompt may hold `think_ms=N`, the wait before the answer, and `gap_ms=N`, between tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.request
import zlib
from pathlib import Path
from typing import Any

DEFAULT_TOKENS = 60
_LINE_BREAK_EVERY = 7


def token(prompt: str, k: int) -> str:
    """Token k of the answer to `prompt`."""
    return "\n\n" if k % _LINE_BREAK_EVERY == _LINE_BREAK_EVERY - 1 else f" {zlib.crc32(f'{prompt}/{k}'.encode()) % 1000}"


def answer(prompt: str, tokens: int) -> str:
    """The whole answer."""
    return "".join(token(prompt, k) for k in range(tokens))


class Upstream:
    """A running server."""

    def __init__(self, *options: str, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--port", str(port), *options], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def requests(self) -> list[Any]:
        """The bodies it has got."""
        return [body for body, _ in self._seen()]

    def authorizations(self) -> list[Any]:
        """The authorization headers that came with them."""
        return [authorization for _, authorization in self._seen()]

    def _seen(self) -> list[Any]:
        with urllib.request.urlopen(f"{self.url}/requests", timeout=5) as response:
            seen: list[Any] = json.load(response)
            return seen

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.kill()


def _number(name: str, text: str) -> int:
    found = re.search(rf"{name}=(\d+)", text)
    return int(found[1]) if found else 0


class _Server:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._seen: list[Any] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head.lower())
                body = json.loads(await reader.readexactly(int(length[1]))) if length else None
                if body is not None:
                    given = re.search(r"authorization: (.*)\r", head)
                    self._seen.append((body, given[1] if given else None))
                await self._answer(head.split()[1], body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, path: str, body: Any, writer: asyncio.StreamWriter) -> None:
        refused = self._options.refuse_prefix and "continue_final_message" in (body or {})
        if path == "/v1/requests":
            _write(writer, 200, self._seen)
        elif body is None:
            _write(writer, 200, {"object": "list", "data": []})
        elif self._options.status != 200:
            _write(writer, self._options.status, {"error": {"message": "not now", "code": "draining"}})
        elif refused:
            _write(writer, 400, {"error": {"message": "unknown parameter", "code": "unknown_parameter"}})
        else:
            await self._complete(body, path == "/v1/chat/completions", writer)

    async def _complete(self, body: Any, chat: bool, writer: asyncio.StreamWriter) -> None:
        prompt, begun = _read(body, chat)
        await asyncio.sleep(_number("think_ms", prompt) / 1000)
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        count = max(0, DEFAULT_TOKENS - begun) if limit is None else limit
        usage = {"prompt_tokens": len(prompt.split()) + begun, "completion_tokens": count}
        usage["total_tokens"] = usage["prompt_tokens"] + count
        kind = ("chat.completion" if chat else "text_completion") + (".chunk" if chat and body.get("stream") else "")
        base = {"id": f"cmpl-{id(body)}", "object": kind, "created": int(time.time()), "model": body["model"]}
        finish = "length" if limit else "stop"
        if not body.get("stream"):
            text = answer(prompt, begun + count)[len(answer(prompt, begun)) :]
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices = [{"index": 0, "finish_reason": finish, **said}]
            _write(writer, 200, {**base, "choices": choices, "usage": usage})
            return

        def event(said: dict[str, Any] | str | None, finish_reason: str | None = None) -> None:
            named = {"delta" if chat else "text": said}
            choices = [] if said is None else [{"index": 0, **named, "finish_reason": finish_reason}]
            _chunk(
                writer, b"data: " + json.dumps({**base, "choices": choices, "usage": usage if said is None else None}).encode()
            )

        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        if chat:
            event({"role": "assistant", "content": ""})
        for k in range(begun, begun + count):
            event({"content": token(prompt, k)} if chat else token(prompt, k))
            await writer.drain()
            await asyncio.sleep(_number("gap_ms", prompt) / 1000)
        event({} if chat else "", finish)
        if (body.get("stream_options") or {}).get("include_usage"):
            event(None)
        _chunk(writer, b"data: [DONE]")
        writer.write(b"0\r\n\r\n")


def _read(body: Any, chat: bool) -> tuple[str, int]:
    """The prompt, and how many tokens of its answer are there."""
    if not chat:
        prompt, _, begun = body["prompt"].partition("\x1f")
        return prompt + "\x1f", _count(prompt + "\x1f", begun)
    messages = body["messages"]
    begun = messages[-1]["content"] if body.get("continue_final_message") and messages[-1]["role"] == "assistant" else ""
    prompt = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    return prompt, _count(prompt, begun.rstrip())


def _count(prompt: str, begun: str) -> int:
    text, k = "", 0
    while len(text) < len(begun):
        text += token(prompt, k)
        k += 1
    assert text == begun, (text, begun)
    return k


def _write(writer: asyncio.StreamWriter, status: int, value: Any) -> None:
    body = json.dumps(value).encode()
    writer.write(b"HTTP/1.1 %d x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))


def _chunk(writer: asyncio.StreamWriter, line: bytes) -> None:
    data = line + b"\n\n"
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--status", type=int, default=200)
    parser.add_argument("--refuse-prefix", action="store_true")
    server = await asyncio.start_server(_Server(parser.parse_args()).serve, "127.0.0.1", parser.parse_args().port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main())
