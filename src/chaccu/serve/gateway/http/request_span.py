"""The span of a request at the gateway: its parent out of the client's headers, its attributes out of its line for the log.

Invariant: of the client's headers only those of W3C's trace context are read. It ignores where spans go.
"""

from __future__ import annotations

from collections.abc import Sequence

from chaccu.serve.gateway.errors import CLIENT_LEFT
from chaccu.serve.gateway.http.request_line import RequestLine
from chaccu.serve.link import TraceContext
from chaccu.serve.tracing import Attribute, RequestSpan, Tracing, describe_answer

_TRACEPARENT, _TRACESTATE = b"traceparent", b"tracestate"
# As the conventions for generative AI call what is asked for.
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


def begin_span(tracing: Tracing, headers: Sequence[tuple[bytes, bytes]], method: str) -> RequestSpan:
    """The span of a request with these `headers`, whose names are lower-case."""
    traceparent, tracestate = b"", []
    for name, value in headers:
        if name == _TRACEPARENT:
            traceparent = value
        elif name == _TRACESTATE:
            tracestate.append(value)
    if not traceparent:
        return tracing.begin(method, None)
    parent = TraceContext(traceparent.decode("latin-1"), b",".join(tracestate).decode("latin-1"))
    return tracing.begin(method, parent)


def write_context(context: TraceContext | None) -> bytes:
    """The lines of a head that say under which span a request is worked on."""
    if context is None:
        return b""
    line = f"traceparent: {context.traceparent}\r\n"
    if context.tracestate:
        line += f"tracestate: {context.tracestate}\r\n"
    return line.encode("latin-1")


def end_span(span: RequestSpan, line: RequestLine, *, has_failed: bool, is_bad: bool) -> None:
    """The request has ended as `line` has it. `has_failed`: with an error, be it after its status; `is_bad`: not by its
    client's fault."""
    operation = _OPERATIONS.get(line.path)
    error = (line.end or str(line.status)) if has_failed or line.status == CLIENT_LEFT else None
    attributes: dict[str, Attribute] = {
        "http.request.method": line.method,
        "url.path": line.path,
        "http.response.status_code": line.status,
        "error.type": error,
        "chaccu.request_id": line.request_id,
        "chaccu.key": line.key,
        "chaccu.worker": line.worker,
        "chaccu.upstream": line.upstream,
        "chaccu.attempts": line.attempts,
    }
    if operation is None:
        name = line.method
    else:
        name = operation if line.model is None else f"{operation} {line.model}"
        attributes |= describe_answer(
            operation,
            asked_model=span.alias or line.model,
            model=line.model,
            prompt_tokens=line.prompt_tokens,
            completion_tokens=line.completion_tokens,
            first_text_s=line.first_text_seconds,
            finish_reason=line.end if error is None else None,
        )
    span.end(name, attributes, error if is_bad else None)
