"""One request over several upstreams that misbehave by script, on real sockets."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from chaccu.serve.gateway import GatewayConfig, Upstream
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.upstreams.connection import ResponseHead
from chaccu.serve.gateway.upstreams.exchange import Exchange
from chaccu.serve.gateway.upstreams.upstream import UpstreamRelay

Script = Callable[[asyncio.StreamWriter, Any], Awaitable[None]]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 50}
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    data = b"data: %b\n\n" % json.dumps({"id": "x", "choices": [choice]}).encode()
    return chunk(data)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


END = event("", "stop") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def whole(status: int, body: bytes = b"{}") -> bytes:
    return b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def sending(*pieces: bytes) -> Script:
    """Send them, and close."""

    async def script(writer: asyncio.StreamWriter, body: Any) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return script


class Got:
    """The receiver of an answer."""

    def __init__(self) -> None:
        self.heads: list[ResponseHead] = []
        self.body = b""
        self.lost: ApiError | None = None
        self.ended = asyncio.Event()
        self.came = asyncio.Event()

    def begin(self, head: ResponseHead) -> None:
        self.heads.append(head)

    def deliver(self, body: bytes) -> None:
        self.body += body
        self.came.set()

    def finish(self, body: bytes) -> None:
        self.body += body
        self.ended.set()

    def fail(self, lost: ApiError) -> None:
        self.lost = lost
        self.ended.set()

    @property
    def text(self) -> str:
        return "".join(json.loads(b'"%b"' % text) for text in re.findall(rb'"content": ?"([^"]*)"', self.body))


class Pool:
    """A relay over one server that has the scripts in turn, each as an upstream of its own by priority."""

    def __init__(self, relay: UpstreamRelay, asked: list[Any]) -> None:
        self.relay = relay
        self.asked = asked
        self.got = Got()

    def ask(self) -> Exchange:
        return self.relay.start("m", "chat/completions", json.dumps(BODY).encode(), self.got, b"x-request-id: id\r\n")

    async def answer(self) -> Got:
        self.ask()
        await asyncio.wait_for(self.got.ended.wait(), 5)
        return self.got


@asynccontextmanager
async def pool(*scripts: Script, wait_s: float = 0.1, continues: bool = True, **config: Any) -> AsyncIterator[Pool]:
    asked: list[Any] = []
    servers = []

    def serving(script: Script) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"POST"):
                    length = re.search(rb"content-length: (\d+)", head)
                    assert length is not None
                    asked.append(json.loads(await reader.readexactly(int(length[1]))))
                    await script(writer, asked[-1])
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                # A probe is closed without an answer: who is left out stays so.
                writer.close()

        return serve

    for script in scripts:
        servers.append(await asyncio.start_server(serving(script), "127.0.0.1", 0))
    upstreams = tuple(
        Upstream("m", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", priority=-index, continues=continues)
        for index, server in enumerate(servers)
    )
    relay = UpstreamRelay(
        GatewayConfig(upstreams=upstreams, rejoin_wait_s=wait_s, **config), lambda model: None, time.monotonic
    )
    yield Pool(relay, asked)
    relay.close()
    for server in servers:
        server.close()


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0)


async def test_statuses_of_servers_that_do_not_serve_move_a_request_on() -> None:
    async with pool(*(sending(whole(status)) for status in (502, 503, 504)), sending(whole(200, b'{"ok":1}'))) as upstreams:
        got = await upstreams.answer()
        assert (got.body, [head.status for head in got.heads]) == (b'{"ok":1}', [200])
        assert [one.failures for one in upstreams.relay.statuses()] == [1, 1, 1, 0]


async def test_other_statuses_are_the_answer() -> None:
    async with pool(sending(whole(429, b'{"error":1}')), sending(whole(200))) as upstreams:
        got = await upstreams.answer()
        assert (got.body, got.heads[0].status, len(upstreams.asked)) == (b'{"error":1}', 429, 1)


async def test_a_request_that_kills_its_upstreams_does_not_kill_them_all() -> None:
    async with pool(*[sending(b"")] * 5) as upstreams:
        got = await upstreams.answer()
        assert got.lost is not None
        assert (got.lost.code, got.heads) == ("upstream_lost", [])
        assert "3 upstreams in turn were lost with it" in got.lost.message
        assert [one.requests for one in upstreams.relay.statuses()] == [1, 1, 1, 0, 0]


async def test_a_stream_goes_on_over_three() -> None:
    scripts = (
        sending(STREAM + event("One"), event(" two")[:-9]),
        sending(STREAM + event(" two") + event(" three")),
        sending(STREAM + event(" four") + END),
    )
    async with pool(*scripts) as upstreams:
        got = await upstreams.answer()
        assert (got.text, got.body.count(b"[DONE]"), len(got.heads)) == ("One two three four", 1, 1)
        assert [body["messages"][-1]["content"] for body in upstreams.asked] == ["hi", "One", "One two three"]
        assert [body["max_tokens"] for body in upstreams.asked] == [50, 49, 47]


async def test_one_that_cannot_go_on_is_passed_over() -> None:
    scripts = (sending(STREAM + event("One")), sending(whole(401)), sending(whole(200)), sending(STREAM + event(" two") + END))
    async with pool(*scripts, max_attempts=4) as upstreams:
        assert (await upstreams.answer()).text == "One two"


async def test_one_that_does_not_go_on_with_a_text_is_not_asked_to() -> None:
    async with pool(sending(STREAM + event("One")), sending(STREAM + event(" two") + END), continues=False) as upstreams:
        got = await upstreams.answer()
        assert got.lost is not None
        assert "does not go on with a text" in got.lost.message
        assert (got.text, len(upstreams.asked)) == ("One", 1)


async def test_a_stream_that_ends_with_its_connection_is_whole_only_with_its_last_event() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"

    def plain(data: bytes) -> bytes:
        return b"".join(re.findall(rb"data: .*\n\n", data))

    cut, complete = head + plain(event("One")), head + plain(event(" two") + END)
    async with pool(sending(cut), sending(complete)) as upstreams:
        got = await upstreams.answer()
        assert (got.text, got.body.count(b"[DONE]"), got.lost) == ("One two", 1, None)


async def test_a_whole_answer_that_ends_with_its_connection_is_whole_only_as_json() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
    async with pool(sending(head + b'{"a": [1'), sending(head + b'{"a": [1, 2]}')) as upstreams:
        assert (await upstreams.answer()).body == b'{"a": [1, 2]}'


async def test_a_stream_too_long_to_remember_ends_with_an_error() -> None:
    async with pool(sending(STREAM, *[event("x" * 60_000)] * 20), sending(STREAM + END)) as upstreams:
        got = await upstreams.answer()
        assert got.lost is not None
        assert "too long to go on with" in got.lost.message
        assert len(got.text) == 1_200_000


async def test_what_the_next_one_sends_amiss_ends_the_stream_with_an_error() -> None:
    async with pool(sending(STREAM + event("One")), sending(STREAM + chunk(b"data: <html>\n\n") + event("lost"))) as upstreams:
        got = await upstreams.answer()
        assert got.lost is not None
        assert "sent no completion" in got.lost.message
        assert got.text == "One"
        assert [one.outstanding for one in upstreams.relay.statuses()] == [0, 0]


async def test_a_client_that_does_not_read_holds_up_the_next_one_too() -> None:
    sent = 0
    moved = asyncio.Event()

    async def flood(writer: asyncio.StreamWriter, body: Any) -> None:
        nonlocal sent
        moved.set()
        writer.write(STREAM)
        for _ in range(150):
            writer.write(event("x" * 100_000))
            await writer.drain()
            sent += 1
        writer.write(END)

    lose = asyncio.Event()

    async def begin(writer: asyncio.StreamWriter, body: Any) -> None:
        writer.write(STREAM + event("One"))
        await lose.wait()

    async with pool(begin, flood) as upstreams:
        exchange = upstreams.ask()
        await upstreams.got.came.wait()
        lose.set()
        await until(lambda: upstreams.relay.statuses()[0].failures == 1)
        exchange.pause()
        await asyncio.wait_for(moved.wait(), 5)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 150
        assert upstreams.got.text == "One"
        exchange.resume()
        await asyncio.wait_for(upstreams.got.ended.wait(), 20)
        assert len(upstreams.got.text) == 3 + 150 * 100_000


async def test_a_client_that_leaves_while_all_are_left_out_is_forgotten() -> None:
    async with pool(sending(whole(503)), wait_s=60) as upstreams:
        exchange = upstreams.ask()
        await until(lambda: upstreams.relay.statuses()[0].state == "failed")
        exchange.cancel()
        await asyncio.sleep(0.05)
        assert not upstreams.got.ended.is_set()
        assert upstreams.relay.statuses()[0].outstanding == 0
