"""`RequestLine`: a request as a line of the log has it, and as its span is described by.

Invariant: what it holds of a client is its id, its path and a model that is known here. It ignores who reads it.
"""

from __future__ import annotations

import msgspec


class RequestLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request in the log. `seconds` to the end of the answer, `first_text_seconds` to its first text. `end`: the answer's
    finish reason, or an error's code, or `client_left`. `attempts`: how often a worker or an upstream was given it."""

    request_id: str
    method: str
    path: str
    status: int
    seconds: float
    key: str | None = None
    model: str | None = None
    first_text_seconds: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    worker: str | None = None
    upstream: str | None = None
    attempts: int | None = None
    end: str | None = None
