"""What operators see of a real gateway: ids on every answer, and a line for every request in its log and its worker's."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.processes import Service, start_gateway, start_worker, wait_until

SECRET_WORDS = "the secret words of some people"


class Observed:
    """A gateway with keys, a worker of `scripted` and an upstream `up`, all of which log JSON."""

    def __init__(self, gateway: Service, worker: Service, upstream: FakeOpenAI, key: str, key_id: str) -> None:
        self.gateway = gateway
        self.worker = worker
        self.upstream = upstream
        self.key = key
        self.key_id = key_id

    def ask(self, path: str, fields: Any = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower-case names) and body."""
        data = None if fields is None else json.dumps(fields).encode()
        request = urllib.request.Request(
            self.gateway.url + path, data, {"authorization": f"Bearer {self.key}", **(headers or {})}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, {name.lower(): value for name, value in response.headers.items()}, response.read()
        except urllib.error.HTTPError as error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()

    def lines(self, service: Service, request_id: str) -> list[dict[str, Any]]:
        """The lines about a request, of which there is one at least."""
        wait_until(lambda: f'"{request_id}"' in service.log, service, timeout_s=5)
        lines = [json.loads(line) for line in service.log.splitlines()]
        return [line for line in lines if line.get("request_id") == request_id]


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": SECRET_WORDS}], **more}


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("observed")
    keys = KeyFile(folder / "keys.json")
    shown, key = keys.create("alice", scopes=["chat", "admin", "worker"])
    with FakeOpenAI({"up": FakeModel(answer=f"{SECRET_WORDS} again")}) as upstream:
        arguments = ("--upstream", f"up={upstream.url}/v1", "--keys", str(folder / "keys.json"), "--log-format", "json")
        with (
            start_gateway(folder, *arguments) as gateway,
            start_worker(
                folder,
                gateway,
                f"scripted:scripted?text={quote(SECRET_WORDS)}&tokens_per_s=20",
                "--join-token",
                shown,
                "--log-format",
                "json",
            ) as worker,
        ):
            yield Observed(gateway, worker, upstream, shown, key.id)
    for service in (gateway, worker):
        assert SECRET_WORDS not in service.log
        assert shown not in service.log
        assert all(json.loads(line)["time"] for line in service.log.splitlines())


@pytest.mark.parametrize("model", ["scripted", "up"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_id_goes_with_a_request_everywhere(observed: Observed, model: str, stream: bool) -> None:
    request_id = f"mine-{model}-{stream}"
    status, headers, _ = observed.ask("/v1/chat/completions", chat(model, stream=stream), {"X-Request-Id": request_id})
    assert (status, headers["x-request-id"]) == (200, request_id)
    (line,) = observed.lines(observed.gateway, request_id)
    told = {name: line.get(name) for name in ("message", "key", "model", "method", "path", "status")}
    assert told == {
        "message": "request",
        "key": observed.key_id,
        "model": model,
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
    }
    assert 0 < line["first_text_seconds"] <= line["seconds"] < 10
    if model == "up":
        assert (line["upstream"], line["attempts"]) == (f"{observed.upstream.url}/v1", 1)
        assert observed.upstream.request_headers[-1]["x-request-id"] == request_id
    else:
        (work,) = observed.lines(observed.worker, request_id)
        for name in ("prompt_tokens", "completion_tokens", "end"):
            assert line[name] == work[name]
        assert (line["end"], line["attempts"]) == ("stop", 1)
        assert line["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "fields", "headers", "status", "end"),
    [
        ("/health", None, {}, 200, None),
        ("/v1/models", None, {}, 200, None),
        ("/nowhere", None, {}, 404, "unknown_url"),
        ("/v1/chat/completions", {}, {}, 400, "missing_required_parameter"),
        ("/v1/chat/completions", chat(SECRET_WORDS), {}, 404, "model_not_found"),
        ("/v1/chat/completions", chat("up", temperature=9), {}, 400, "invalid_value"),
        ("/v1/messages", chat("up"), {"authorization": "Bearer no-key"}, 401, "invalid_api_key"),
        ("/admin/workers", None, {}, 200, None),
    ],
)
def test_every_answer_has_an_id(
    observed: Observed, path: str, fields: Any, headers: dict[str, str], status: int, end: str | None
) -> None:
    got, answered, _ = observed.ask(path, fields, headers)
    assert got == status
    assert re.fullmatch(r"req-[0-9a-f]+-[0-9a-f]+", answered["x-request-id"])
    if path != "/health":
        (line,) = observed.lines(observed.gateway, answered["x-request-id"])
        assert (line["status"], line.get("end"), line["path"]) == (status, end, path)


@pytest.mark.parametrize("wrong", ["x" * 129, "with space", "tab\tbed", "ünlatin"])
@pytest.mark.parametrize("path", ["/health", "/v1/chat/completions"])
def test_an_id_that_is_none_is_replaced(observed: Observed, path: str, wrong: str) -> None:
    _, headers, _ = observed.ask(path, None if path == "/health" else chat("up"), {"X-Request-Id": wrong})
    assert headers["x-request-id"].startswith("req-")


async def test_what_is_no_http_gets_an_error_with_an_id(observed: Observed) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(observed.gateway.url.rpartition(":")[2]))
    writer.write(b"HELLO\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"x-request-id: req-" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


@pytest.mark.parametrize("model", ["scripted", "up"])
async def test_a_client_that_leaves_is_told(observed: Observed, model: str) -> None:
    observed.upstream.models["up"].delay_s = 0.5
    request_id = f"left-{model}"
    _, writer = await asyncio.open_connection("127.0.0.1", int(observed.gateway.url.rpartition(":")[2]))
    body = json.dumps(chat(model, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {observed.key}\r\n"
    writer.write(f"{head}x-request-id: {request_id}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await asyncio.sleep(0.05)
    writer.transport.abort()
    (line,) = await asyncio.to_thread(observed.lines, observed.gateway, request_id)
    assert (line["status"], line["end"]) == (499, "client_left")
    if model == "scripted":
        (work,) = await asyncio.to_thread(observed.lines, observed.worker, request_id)
        assert work["end"] == "cancelled"
