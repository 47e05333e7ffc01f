"""How a real gateway relays to an upstream that speaks HTTP by script, byte by byte."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from chaccu.testing.processes import Service, start_gateway

ASKED = {"model": "up", "messages": [{"role": "user", "content": "Hi"}]}
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [b'data: {"n": %d}\n\n' % n for n in range(3)]
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def whole(body: bytes, extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b" % (extra, len(body), body)


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    match = re.search(rb"content-length: (\d+)", head.lower())
    return head, await reader.readexactly(int(match[1]) if match else 0)


async def read_response(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of a response, its chunks joined."""
    head = await reader.readuntil(b"\r\n\r\n")
    match = re.search(rb"content-length: (\d+)", head.lower())
    if match:
        return head, await reader.readexactly(int(match[1]))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return head, body


def request(fields: Any = ASKED, *, extra: bytes = b"") -> bytes:
    body = json.dumps(fields).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n%b" % (extra, len(body), body)


class Relay:
    """A gateway before a scripted upstream; `connections` counts those that the upstream has seen."""

    def __init__(self, gateway: Service) -> None:
        self.gateway = gateway
        self.connections = 0

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", int(self.gateway.url.rpartition(":")[2]))

    async def ask(self, data: bytes) -> tuple[bytes, bytes]:
        reader, writer = await self.connect()
        writer.write(data)
        try:
            return await asyncio.wait_for(read_response(reader), 5)
        finally:
            writer.close()


@asynccontextmanager
async def relaying(folder: Path, script: Script, *options: str) -> AsyncIterator[Relay]:
    relay: Relay

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay.connections += 1
        try:
            await script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    gateway = await asyncio.to_thread(start_gateway, folder, "--upstream", f"up=http://127.0.0.1:{port}/v1", *options)
    relay = Relay(gateway)
    with gateway:
        yield relay
    server.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each request with its own body, for as long as the connection lasts."""
    while True:
        head, body = await read_request(reader)
        assert head.startswith(b"POST /v1/")
        writer.write(whole(body, b"X-Request-Id: the upstream's own\r\nX-Other: 1\r\n"))


async def test_bodies_pass_unchanged_over_one_kept_connection(tmp_path: Path) -> None:
    async with relaying(tmp_path, echo) as relay:
        reader, writer = await relay.connect()
        odd = {**ASKED, "unknown_here": [1.50, "é"], "messages": [{"role": "user", "content": "x" * 300_000}]}
        for fields in (ASKED, odd, ASKED):
            writer.write(request(fields))
            head, body = await asyncio.wait_for(read_response(reader), 5)
            assert body == json.dumps(fields).encode()
            assert re.findall(rb"(?i)x-request-id: (.*)\r\n", head)[0].startswith(b"req-")
            assert b"the upstream's own" not in head
        # In pieces, and in chunks.
        data = request()
        for byte in data:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await asyncio.wait_for(read_response(reader), 5))[1] == json.dumps(ASKED).encode()
        pieces = json.dumps(ASKED).encode()
        chunked = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(chunked + chunk(pieces[:7]) + chunk(pieces[7:]) + b"0\r\n\r\n")
        assert (await asyncio.wait_for(read_response(reader), 5))[1] == pieces
        writer.write(request(extra=b"expect: 100-continue\r\n"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        assert (await asyncio.wait_for(read_response(reader), 5))[1] == pieces
        # Between them, what the app answers.
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await asyncio.wait_for(read_response(reader), 5))[1] == b'{"status":"ok"}'
        writer.write(request())
        assert (await asyncio.wait_for(read_response(reader), 5))[1] == pieces
        writer.close()
        assert relay.connections == 1
        metrics = (await asyncio.to_thread(urllib.request.urlopen, f"{relay.gateway.url}/metrics")).read().decode()
        assert 'chaccu_requests_total{model="up",status="200"} 7.0' in metrics


async def test_an_alias_of_an_upstream_reaches_it_under_its_own_name(tmp_path: Path) -> None:
    async with relaying(tmp_path, echo, "--alias", "gpt-3.5-turbo=up") as relay:
        head, body = await relay.ask(request({**ASKED, "model": "gpt-3.5-turbo"}))
        assert head.startswith(b"HTTP/1.1 200")
        assert json.loads(body) == ASKED


async def test_an_alias_goes_before_the_upstream_that_it_is_named_like(tmp_path: Path) -> None:
    async with relaying(tmp_path, echo, "--upstream", "other=http://127.0.0.1:9/v1", "--alias", "other=up") as relay:
        head, body = await relay.ask(request({**ASKED, "model": "other"}))
        assert head.startswith(b"HTTP/1.1 200")
        assert json.loads(body) == ASKED


async def test_wrong_requests_do_not_reach_the_upstream(tmp_path: Path) -> None:
    async with relaying(tmp_path, echo) as relay:
        for wrong, param in (
            ({"temperature": 9}, "temperature"),
            ({"stop": 3}, "stop"),
            ({"max_tokens": -1}, "max_tokens"),
            ({"messages": []}, "messages"),
        ):
            head, body = await relay.ask(request({**ASKED, **wrong}))
            assert head.startswith(b"HTTP/1.1 400")
            assert json.loads(body)["error"]["param"] == param
        head, body = await relay.ask(request({**ASKED, "model": "upp"}))
        assert head.startswith(b"HTTP/1.1 404")
        assert "did you mean 'up'" in json.loads(body)["error"]["message"]
        head, _ = await relay.ask(request({**ASKED, "messages": [{"role": "user", "content": "x" * 5_000_000}]}))
        assert head.startswith(b"HTTP/1.1 413")
        assert relay.connections == 0


@pytest.mark.parametrize("cut", [0, 9])
async def test_an_upstream_that_dies_in_a_stream_is_told_as_an_event(tmp_path: Path, cut: int) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        torn = chunk(EVENTS[2])[: cut + 4 if cut else 0]
        writer.write(STREAM_HEAD + chunk(EVENTS[0]) + chunk(EVENTS[1]) + torn)
        await writer.drain()

    async with relaying(tmp_path, die) as relay:
        _, body = await relay.ask(request({**ASKED, "stream": True}))
        *events, last = [event for event in body.split(b"\n\n") if event.strip()]
        assert [event + b"\n\n" for event in events] == EVENTS[:2]
        assert json.loads(last.strip().removeprefix(b"data: "))["error"]["code"] == "upstream_lost"


@pytest.mark.parametrize("size", [100, 3 * 2**20])
async def test_a_whole_answer_that_breaks_off_is_not_made_to_look_complete(tmp_path: Path, size: int) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        if head.startswith(b"GET"):
            writer.write(whole(b"{}"))
        else:
            writer.write(whole(b"x" * size)[:-10])
        await writer.drain()

    async with relaying(tmp_path, die) as relay:
        if size > 2**20:
            # A part of it has left by then.
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await relay.ask(request())
            return
        head, body = await relay.ask(request())
        assert head.startswith(b"HTTP/1.1 502")
        assert json.loads(body)["error"]["code"] == "upstream_lost"
        # Three in turn, with a probe before each but the first.
        assert relay.connections == 5


async def test_a_kept_connection_that_was_closed_is_replaced(tmp_path: Path) -> None:
    async def once_more(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        writer.write(whole(body))
        await read_request(reader)  # and is not answered

    async with relaying(tmp_path, once_more) as relay:
        for _ in range(3):
            assert (await relay.ask(request()))[0].startswith(b"HTTP/1.1 200")
        assert relay.connections == 3


async def test_a_client_that_leaves_stops_the_upstream_at_once(tmp_path: Path) -> None:
    gone: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD + chunk(EVENTS[0]))
        with suppress(ConnectionError):
            await reader.read()
        gone.set_result(asyncio.get_running_loop().time())

    async with relaying(tmp_path, endless) as relay:
        reader, writer = await relay.connect()
        writer.write(request({**ASKED, "stream": True}))
        await reader.readuntil(EVENTS[0])
        left_s = asyncio.get_running_loop().time()
        writer.transport.abort()
        assert await asyncio.wait_for(gone, 5) - left_s < 0.1


async def test_a_client_that_does_not_read_stops_only_its_own_upstream(tmp_path: Path) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        _, body = await read_request(reader)
        if b'"stream"' not in body:
            writer.write(whole(body))
            return
        writer.write(STREAM_HEAD)
        while True:
            writer.write(chunk(b"data: " + b"x" * 65_000 + b"\n\n"))
            await writer.drain()
            sent += 65_000

    async with relaying(tmp_path, flood) as relay:
        _, writer = await relay.connect()
        writer.write(request({**ASKED, "stream": True}))
        await asyncio.sleep(1)
        before = sent
        assert (await relay.ask(request()))[0].startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.5)
        # What the kernel's buffers hold, and no more.
        assert before == sent < 64 * 2**20
        status = await asyncio.to_thread(Path(f"/proc/{relay.gateway.pid}/status").read_text)
        assert int(re.search(r"VmRSS:\s+(\d+)", status)[1]) < 100_000  # type: ignore[index]
        writer.transport.abort()


async def test_requests_in_a_pipeline_are_refused_by_closing(tmp_path: Path) -> None:
    async with relaying(tmp_path, echo) as relay:
        reader, writer = await relay.connect()
        writer.write(request() + request())
        answers = await asyncio.wait_for(reader.read(), 5)
        assert answers.count(b"HTTP/1.1 200 OK") == 1
        writer.close()
