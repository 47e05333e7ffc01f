"""`Tracing`: spans of requests for an OpenTelemetry collector; `RequestSpan` is one.

Attributes have the names of OpenTelemetry's conventions for generative AI and HTTP where those have one, and begin with
`chaccu.` elsewhere. Ids come from a client's W3C `traceparent` and go on in the same form.

Invariants: nothing of OpenTelemetry is imported before a `Tracing` is made; no text, header or secret goes into a span; nobody
waits for the collector: a thread of the library sends, what waits for it is bounded, and so is the time for the last ones. It
ignores how requests are answered.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from chaccu.errors import MissingDependencyError, UsageError
from chaccu.serve.link import TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.trace import Span

Attribute = str | int | float | tuple[str, ...] | None

_PATH = "/v1/traces"
_PROVIDER = "chaccu"
_CLOSE_S = 2.0


class Tracing:
    """The spans of one process. As a context manager it sends at the end of the block what waits, for two seconds at most."""

    def __init__(self, url: str, service: str) -> None:
        """`url` is the collector's for OTLP over HTTP, without /v1/traces; `service` the name of this one where
        OTEL_SERVICE_NAME gives none. The library's other variables hold too.

        Raises `UsageError` for a wrong URL, `MissingDependencyError` where the library is not installed.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no URL of a collector.", remedy="write it as --otlp http://HOST:4318")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise MissingDependencyError("opentelemetry-sdk", extra="otel", needed_for="--otlp") from error
        self._provider = TracerProvider(resource=_name_service(service), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url.rstrip("/") + _PATH)))
        self._tracer = self._provider.get_tracer(_PROVIDER)
        self._propagator = TraceContextTextMapPropagator()

    def __enter__(self) -> Tracing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The library itself would try for up to 30 s.
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def begin(self, name: str, parent: TraceContext | None) -> RequestSpan:
        """The span of a request that has come, below `parent` where that is one."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        above = {} if parent is None else {"traceparent": parent.traceparent, "tracestate": parent.tracestate}
        span = self._tracer.start_span(name, self._propagator.extract(above), SpanKind.SERVER)
        below: dict[str, str] = {}
        self._propagator.inject(below, set_span_in_context(span))
        # Spans that the library's own variables turn off have no ids.
        context = TraceContext(below["traceparent"], below.get("tracestate", "")) if below else None
        return RequestSpan(span, context)


class RequestSpan:
    """One request, or what one worker has of it. `context`: its ids, for whoever is given the request next, if it has any;
    `alias`: the name that the model was asked for by, where that is not its own."""

    def __init__(self, span: Span, context: TraceContext | None) -> None:
        self.context = context
        self.alias: str | None = None
        self._span = span

    def note_first_text(self) -> None:
        """The first text of the answer has come."""
        self._span.add_event("first_token")

    def end(self, name: str, attributes: Mapping[str, Attribute], failed: str | None) -> None:
        """It has ended: its name, now that it is known, what is told of it (None: not known), and the code of the error if
        it has failed."""
        self._span.update_name(name)
        for key, value in attributes.items():
            if value is not None:
                self._span.set_attribute(key, value)
        if failed is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, failed)
        self._span.end()


def describe_answer(
    operation: str,
    *,
    asked_model: str | None,
    model: str | None,
    prompt_tokens: int | None,
    completion_tokens: int | None,
    first_text_s: float | None,
    finish_reason: str | None,
) -> dict[str, Attribute]:
    """What is told of a model's answer, in the names of the conventions for generative AI."""
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": asked_model,
        "gen_ai.response.model": model,
        "gen_ai.usage.input_tokens": prompt_tokens,
        "gen_ai.usage.output_tokens": completion_tokens,
        "gen_ai.response.time_to_first_chunk": first_text_s,
        "gen_ai.response.finish_reasons": None if finish_reason is None else (finish_reason,),
    }


def _name_service(service: str) -> Resource:
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return resource.merge(Resource({SERVICE_NAME: service}))
    return resource
