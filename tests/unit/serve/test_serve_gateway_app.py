"""What holds of the gateway before any worker joins, and of its configuration."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from starlette.types import Message, Receive, Scope, Send

from chaccu.errors import StorageError, UsageError
from chaccu.serve.gateway import GatewayConfig, Upstream, create_gateway, parse_upstream
from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.serve.gateway.cors import CorsPolicy
from chaccu.serve.gateway.http.metrics import GatewayMetrics
from chaccu.serve.gateway.http.observed_app import ObservedApp, note_of
from chaccu.serve.gateway.http.request_note import Observer
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.link import MAX_FRAME_BYTES, Generate, LinkError, Output, Piece, Sampling, decode_from_worker, encode_frame
from chaccu.serve.worker import WorkerConfig, run_worker
from chaccu.serve.worker.gateways import join_url


def test_the_gateway_needs_no_torch() -> None:
    code = "import sys, chaccu.serve.gateway as g; g.create_gateway(g.GatewayConfig()); print({'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_two_gateways_share_nothing() -> None:
    first, second = create_gateway(GatewayConfig()), create_gateway(GatewayConfig())
    assert not {id(route) for route in first.routes} & {id(route) for route in second.routes}


def test_an_open_address_needs_keys_or_a_word_and_a_token(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without API keys"):
        create_gateway(GatewayConfig(host="0.0.0.0", join_token="secret"))
    with pytest.raises(UsageError, match="no join token"):
        create_gateway(GatewayConfig(host="0.0.0.0", is_open=True))
    create_gateway(GatewayConfig(host="0.0.0.0", join_token="secret", is_open=True))
    KeyFile(tmp_path / "keys.json").create("alice")
    create_gateway(GatewayConfig(host="0.0.0.0", keys=tmp_path / "keys.json"))
    with pytest.raises(StorageError, match=r"no file or folder .*none\.json"):
        create_gateway(GatewayConfig(keys=tmp_path / "none.json"))


def test_upstreams_are_checked() -> None:
    assert parse_upstream("llama3=http://127.0.0.1:11434/v1/") == Upstream("llama3", "http://127.0.0.1:11434/v1")
    for wrong in ("llama3", "=http://h/v1", "a=ftp://h", "a=http://"):
        with pytest.raises(UsageError, match="is no upstream"):
            parse_upstream(wrong)
    with pytest.raises(UsageError, match="named twice"):
        create_gateway(GatewayConfig(upstreams=(Upstream("a", "http://h"), Upstream("a", "http://h"))))
    create_gateway(GatewayConfig(upstreams=(Upstream("a", "http://h"), Upstream("a", "http://i"))))


@pytest.mark.parametrize(
    ("gateway", "url"),
    [
        ("http://127.0.0.1:8000", "ws://127.0.0.1:8000/workers/join"),
        ("https://chat.example.org/llm/", "wss://chat.example.org/llm/workers/join"),
        ("localhost:8000", "ws://localhost:8000/workers/join"),
    ],
)
def test_where_workers_join(gateway: str, url: str) -> None:
    assert join_url(gateway) == url


def test_a_gateway_url_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="is no gateway URL"):
        join_url("ftp://host")


def test_frames_are_bounded_and_checked() -> None:
    frame = Output([Piece(1, "é🦙", 2), Piece(2, "", 0, 5, "stop")])
    assert decode_from_worker(encode_frame(frame)) == frame
    with pytest.raises(LinkError, match="exceeds the limit"):
        encode_frame(Generate(request=1, model="m", sampling=Sampling(), prompt="x" * MAX_FRAME_BYTES))
    for wrong in (b"", b"\x80", encode_frame(frame)[:-2]):
        with pytest.raises(LinkError, match="malformed"):
            decode_from_worker(wrong)


def test_a_worker_with_an_authority_is_told_that_there_is_no_tls(tmp_path: Path) -> None:
    config = WorkerConfig(model="scripted:m", gateways=("http://127.0.0.1:9",), tls_ca=tmp_path / "ca.pem")
    with pytest.raises(UsageError, match=r"no TLS to http://127\.0\.0\.1:9"):
        run_worker(config, print)


async def test_a_crash_in_mid_answer_is_noted_as_one() -> None:
    async def crash(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        note_of(scope).model = "m"
        raise ZeroDivisionError

    async def send(message: Message) -> None:
        pass

    metrics = GatewayMetrics()
    app = ObservedApp(crash, Observer(metrics, None, CorsPolicy(()), time.monotonic))
    with pytest.raises(ZeroDivisionError):
        await app({"type": "http", "headers": [], "method": "GET", "path": "/"}, None, send)  # type: ignore[arg-type]
    assert 'chaccu_requests_total{model="m",status="500"} 1.0' in metrics.render(WorkerRegistry(time.monotonic)).decode()
