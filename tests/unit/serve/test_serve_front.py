"""Slow clients at `Front`, with a transport that only keeps what is written; and streams by whole lines."""

from __future__ import annotations

from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from chaccu.serve.gateway import GatewayConfig, create_gateway
from chaccu.serve.gateway.http.front import Front
from chaccu.serve.gateway.upstreams.whole_lines import WholeLines


class KeptTransport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.data = b""
        self.closed = False
        self.unread_bytes = 0

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes

    def write(self, data: bytes) -> None:
        self.data += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


@pytest.mark.parametrize(
    ("sent", "limit_s", "status"),
    [
        (b"", 60, b""),
        (b"POST /v1/chat/comp", 10, b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n", 10, b"HTTP/1.1 408"),
        (b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 10\r\n\r\n{", 60, b"HTTP/1.1 408"),
        (b"POST /v1/messages HTTP/1.1\r\ncontent-length: 10\r\n\r\n{", 60, b"HTTP/1.1 408"),
    ],
)
async def test_a_client_that_takes_too_long_is_let_go(sent: bytes, limit_s: float, status: bytes) -> None:
    app = create_gateway(GatewayConfig())
    settings = uvicorn.Config(app, log_config=None)
    front = Front(app.state.fast_relay, config=settings, server_state=ServerState(), app_state={})
    transport = KeptTransport()
    front.connection_made(transport)  # type: ignore[arg-type]
    if sent:
        front.data_received(sent)
    began_s = front.loop.time()
    front.check_time(began_s + limit_s - 1)
    assert not transport.closed
    front.check_time(began_s + limit_s + 1)
    assert transport.closed
    assert transport.data.startswith(status)
    assert (b"request_timeout" in transport.data) == bool(status)
    assert (b'"type":"timeout_error"' in transport.data) == (b"/v1/messages" in sent)


async def test_a_client_that_reads_nothing_of_its_answer_is_let_go() -> None:
    app = create_gateway(GatewayConfig())
    settings = uvicorn.Config(app, log_config=None)
    front = Front(app.state.fast_relay, config=settings, server_state=ServerState(), app_state={})
    transport = KeptTransport()
    front.connection_made(transport)  # type: ignore[arg-type]
    front._limits.owes = None  # all of a request has come
    for began_s in (0, 1000):
        front.pause_writing()
        for now_s, unread_bytes in [(0, 70_000), (119, 70_000), (121, 69_999), (240, 69_999)]:
            transport.unread_bytes = unread_bytes
            front.check_time(float(began_s + now_s))
            assert not transport.closed
        if not began_s:
            front.resume_writing()
            front.check_time(999.0)
    front.check_time(1242.0)
    assert transport.closed


def test_a_stream_passes_by_whole_lines() -> None:
    lines = WholeLines()
    assert [lines.take(data) for data in (b"a\nb", b"c", b"\n\n", b"d")] == [b"a\n", b"", b"bc\n\n", b""]
    assert (lines.take_rest(), lines.take_rest()) == (b"d", b"")
    assert len(lines.take(b"x" * 100_000)) == 100_000
