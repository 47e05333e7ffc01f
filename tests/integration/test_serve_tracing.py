"""The spans of a real gateway and its worker at a collector: their parents, what they tell, and what they do not."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.http_thread import HttpThread
from chaccu.testing.processes import Service, start_gateway, start_worker

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

SECRET_WORDS = "the secret words of some people"
TRACE, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACED = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01", "tracestate": "vendor=x"}
WAIT_S = 10.0
UNSET, ERROR = 0, 2


class Span(msgspec.Struct):
    """One span, as the collector got it."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    events: list[str]
    status: int


class Collector(HttpThread):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.received = b""
        super().__init__([Route("/v1/traces", self._take, methods=["POST"])])

    async def _take(self, request: Request) -> Response:
        body = await request.body()
        self.received += body
        for resource_spans in trace_service.ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _read(resource_spans.resource.attributes)["service.name"]
            for scope_spans in resource_spans.scope_spans:
                self.spans += [_to_span(service, span) for span in scope_spans.spans]
        return Response(media_type="application/x-protobuf")

    def of(self, request_id: str, count: int) -> dict[str, Span]:
        """The `count` spans of a request by their service, once they have come."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            found = [span for span in self.spans if span.attributes.get("chaccu.request_id") == request_id]
            if len(found) >= count or time.monotonic() > deadline_s:
                assert len(found) == count, self.spans
                return {span.service: span for span in found}
            time.sleep(0.02)


def _read(attributes: Any) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        read[attribute.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return read


def _to_span(service: str, span: Any) -> Span:
    return Span(
        service=service,
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        attributes=_read(span.attributes),
        events=[event.name for event in span.events if span.start_time_unix_nano <= event.time_unix_nano],
        status=span.status.code,
    )


class Traced:
    """A gateway with a worker of `scripted` and an upstream `up`, and their collector."""

    def __init__(self, folder: Path, gateway: Service, collector: Collector, upstream: FakeOpenAI) -> None:
        self.folder = folder
        self.gateway = gateway
        self.collector = collector
        self.upstream = upstream

    def ask(self, request_id: str, model: str, headers: Mapping[str, str], **more: Any) -> int:
        """The status of the answer, which is read to its end."""
        fields = {"model": model, "messages": [{"role": "user", "content": SECRET_WORDS}], **more}
        request = urllib.request.Request(
            f"{self.gateway.url}/v1/chat/completions",
            json.dumps(fields).encode(),
            {"x-request-id": request_id, **headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as response:
                response.read()
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("traced")
    with (
        pytest.MonkeyPatch.context() as patch,
        Collector() as collector,
        FakeOpenAI({"up": FakeModel(answer=SECRET_WORDS)}) as upstream,
    ):
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        options = ["--upstream", f"up={upstream.url}/v1", "--alias", "nick=scripted", "--rejoin-wait", "0"]
        with start_gateway(folder, *options, "--otlp", collector.root) as gateway:
            # The worker finds the collector by the variable.
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.root)
            model = f"scripted:scripted?text={quote(SECRET_WORDS)}&tokens_per_s=20&context_tokens=200"
            with start_worker(folder, gateway, model):
                yield Traced(folder, gateway, collector, upstream)
    assert SECRET_WORDS.encode() not in collector.received


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_span_at_the_gateway_and_one_below_it_at_the_worker(traced: Traced, stream: bool) -> None:
    request_id = f"whole-{stream}"
    assert traced.ask(request_id, "nick", TRACED, stream=stream) == 200
    spans = traced.collector.of(request_id, 2)
    gateway, worker = spans["chaccu-gateway"], spans["chaccu-worker"]
    assert (gateway.trace, gateway.parent) == (TRACE, CLIENT_SPAN)
    assert (worker.trace, worker.parent) == (TRACE, gateway.id)
    told = gateway.attributes
    assert told.pop("gen_ai.response.time_to_first_chunk") > 0
    assert told == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "chaccu",
        "gen_ai.request.model": "nick",
        "gen_ai.response.model": "scripted",
        "gen_ai.usage.input_tokens": worker.attributes["gen_ai.usage.input_tokens"],
        "gen_ai.usage.output_tokens": worker.attributes["gen_ai.usage.output_tokens"],
        "gen_ai.response.finish_reasons": ["stop"],
        "chaccu.request_id": request_id,
        "chaccu.worker": worker.attributes["chaccu.worker"],
        "chaccu.attempts": 1,
    }
    assert told["gen_ai.usage.output_tokens"] > 0
    for span in (gateway, worker):
        assert (span.name, span.status, span.events) == ("chat scripted", UNSET, ["first_token"])
        assert span.attributes["gen_ai.response.finish_reasons"] == ["stop"]


@pytest.mark.parametrize("model", ["up", "nickless"])
def test_an_upstream_gets_the_gateways_span(traced: Traced, model: str) -> None:
    status = traced.ask(f"passed-{model}", model, TRACED, stream=True)
    (span,) = traced.collector.of(f"passed-{model}", 1).values()
    assert (span.trace, span.parent) == (TRACE, CLIENT_SPAN)
    if model == "up":
        assert status == span.attributes["http.response.status_code"] == 200
        assert traced.upstream.request_headers[-1]["traceparent"] == f"00-{TRACE}-{span.id}-01"
        assert traced.upstream.request_headers[-1]["tracestate"] == "vendor=x"
        assert span.attributes["chaccu.upstream"] == f"{traced.upstream.url}/v1"
        assert span.events == ["first_token"]
    else:
        assert (status, span.attributes["error.type"], span.status) == (404, "model_not_found", UNSET)


@pytest.mark.parametrize("headers", [{}, {"traceparent": "00-zz-1-01"}])
def test_without_a_traceparent_a_trace_begins(traced: Traced, headers: dict[str, str]) -> None:
    request_id = f"root-{len(headers)}"
    assert traced.ask(request_id, "scripted", headers) == 200
    spans = traced.collector.of(request_id, 2)
    gateway, worker = spans["chaccu-gateway"], spans["chaccu-worker"]
    assert gateway.parent == ""
    assert (worker.trace, worker.parent) == (gateway.trace, gateway.id)


def test_questions_have_spans_too(traced: Traced) -> None:
    request = urllib.request.Request(
        f"{traced.gateway.url}/tokenize", b'{"model": "scripted", "prompt": "hi"}', {"x-request-id": "question", **TRACED}
    )
    with urllib.request.urlopen(request, timeout=WAIT_S):
        pass
    spans = traced.collector.of("question", 2)
    assert spans["chaccu-gateway"].name == "POST"
    assert (spans["chaccu-worker"].name, spans["chaccu-worker"].parent) == ("tokenize scripted", spans["chaccu-gateway"].id)


async def test_a_client_that_leaves_ends_both_spans(traced: Traced) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(traced.gateway.url.rpartition(":")[2]))
    body = json.dumps({"model": "scripted", "stream": True, "messages": [{"role": "user", "content": SECRET_WORDS}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: left\r\ntraceparent: {TRACED['traceparent']}\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    await asyncio.sleep(0.1)
    writer.transport.abort()
    spans = await asyncio.to_thread(traced.collector.of, "left", 2)
    gateway, worker = spans["chaccu-gateway"], spans["chaccu-worker"]
    assert (gateway.parent, worker.parent) == (CLIENT_SPAN, gateway.id)
    assert (gateway.attributes["http.response.status_code"], gateway.attributes["error.type"]) == (499, "client_left")
    assert worker.attributes["error.type"] == "cancelled"
    assert "gen_ai.response.finish_reasons" not in gateway.attributes | worker.attributes
    assert (gateway.status, worker.status) == (UNSET, UNSET)


def test_a_request_that_its_worker_refuses_fails_in_both_spans(traced: Traced) -> None:
    assert traced.ask("refused", "scripted", TRACED, messages=[{"role": "user", "content": "x" * 1000}]) == 400
    spans = traced.collector.of("refused", 2)
    gateway, worker = spans["chaccu-gateway"], spans["chaccu-worker"]
    assert (gateway.parent, worker.parent) == (CLIENT_SPAN, gateway.id)
    assert gateway.attributes["error.type"] == "context_length_exceeded"
    assert worker.attributes["error.type"] == "context_overflow"


async def test_an_answer_whose_worker_dies_is_an_error(traced: Traced) -> None:
    with start_worker(traced.folder, traced.gateway, "scripted:mortal?tokens=100&tokens_per_s=10") as mortal:
        asking = asyncio.create_task(asyncio.to_thread(traced.ask, "died", "mortal", TRACED, stream=True))
        await asyncio.sleep(0.5)
        mortal.kill()
        await asking
    spans = await asyncio.to_thread(traced.collector.of, "died", 1)
    gateway = spans["chaccu-gateway"]
    assert (gateway.parent, gateway.status) == (CLIENT_SPAN, ERROR)
    assert (gateway.attributes["http.response.status_code"], gateway.attributes["error.type"]) == (200, "worker_lost")
    assert gateway.attributes["chaccu.worker"]


def test_a_collector_that_is_gone_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with start_gateway(tmp_path, "--otlp", "http://127.0.0.1:9") as gateway:
        for _ in range(3):
            with urllib.request.urlopen(f"{gateway.url}/v1/models", timeout=2):
                pass
            time.sleep(0.1)
        begun_s = time.monotonic()
        assert gateway.stop() == 0
    assert time.monotonic() - begun_s < 5
    assert "retrying" in gateway.log, "nothing says that spans do not arrive"
    assert len(gateway.log.splitlines()) < 10
