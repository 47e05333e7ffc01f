"""`ScriptedJudge`: an OpenAI-compatible server that behaves, request by request, as a script says, down to broken connections.

Invariants: it listens on loopback at a port that the kernel picked; it keeps every request's body and counts those of equal
messages. It speaks just enough of HTTP for one request a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, TypeAlias

import msgspec

How = Literal["whole", "reset", "silent", "garbage", "half"]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What comes back. `text` in one event, or a `refusal` in its place, `model` and `usage` (tokens read, written) where they
    are given; with a `status` other than 200 an error of `code` about `param`, whose message is `text`. `how`: "reset" breaks
    the connection, "silent" says nothing, "garbage" is a page of HTML, "half" ends within the JSON of the text's event."""

    text: str = ""
    refusal: str | None = None
    status: int = 200
    code: str = "error"
    param: str | None = None
    headers: Mapping[str, str] = {}
    model: str | None = None
    usage: tuple[int, int] | None = (100, 10)
    finish_reason: str = "stop"
    how: How = "whole"
    delay_s: float = 0.0


Script: TypeAlias = Callable[[dict[str, Any], int], Reply]
"""Gets a request's body and how often its messages have come, from 1."""


class ScriptedJudge:
    """The server, in a thread. Use it as a context manager; `url` is its address."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> ScriptedJudge:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(timeout=10)

    async def _serve(self) -> None:
        answering: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._answer(reader, writer))
            answering.add(task)
            task.add_done_callback(answering.discard)

        await asyncio.start_server(accept, sock=self._listener)
        await self._ended.wait()
        self._listener.close()
        for task in list(answering):
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
            data = await reader.readexactly(length)
            if not data:
                _write(writer, 200, b'{"object": "list", "data": []}')
                return
            body = json.loads(data)
            self.bodies.append(body)
            digest = hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()
            self.counts[digest] += 1
            reply = self.script(body, self.counts[digest])
            await asyncio.sleep(reply.delay_s)
            if reply.how == "silent":
                await self._ended.wait()
            elif reply.how == "reset":
                # An RST instead of an end: the client reads "connection reset by peer".
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                _write_reply(writer, reply)
                await writer.drain()
        writer.close()


def _write_reply(writer: asyncio.StreamWriter, reply: Reply) -> None:
    if reply.how == "garbage":
        _write(writer, 200, b"<html>It works!</html>", kind="text/html")
    elif reply.status != 200:
        error = {"error": {"message": reply.text or f"scripted {reply.status}", "code": reply.code, "param": reply.param}}
        _write(writer, reply.status, json.dumps(error).encode(), reply.headers)
    else:
        head: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "created": 0}
        if reply.model is not None:
            head["model"] = reply.model
        delta = {"content": reply.text} if reply.refusal is None else {"refusal": reply.refusal}
        said = {"index": 0, "delta": delta, "finish_reason": reply.finish_reason}
        events = [json.dumps({**head, "choices": [said]})]
        if reply.usage is not None:
            read, written = reply.usage
            usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
            events.append(json.dumps({**head, "choices": [], "usage": usage}))
        whole = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
        if reply.how == "half":
            whole = f"data: {events[0][: len(events[0]) // 2]}\n\n"
        _write(writer, 200, whole.encode(), kind="text/event-stream")


def _write(
    writer: asyncio.StreamWriter,
    status: int,
    body: bytes,
    headers: Mapping[str, str] | None = None,
    *,
    kind: str = "application/json",
) -> None:
    lines = [f"HTTP/1.1 {status} x", f"content-type: {kind}", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
