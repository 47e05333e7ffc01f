"""`ChatError` and its kinds: what became of a chat request, with the model and the server, as people and counts need it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

from chaccu.errors import ChaccuError


class ChatError(ChaccuError):
    """A chat request failed.

    `cause` is a short stable name for counting; `model` is the model that was asked, if any; `retry_after_s` is how long the
    server wants to be left alone, if it says so; `was_taken` says that it may have worked on the request, and charges for it.
    """

    cause: ClassVar[str] = "failed"

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        model: str | None = None,
        retry_after_s: float | None = None,
        was_taken: bool = False,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.model = model
        self.retry_after_s = retry_after_s
        self.was_taken = was_taken


class ServerUnreachableError(ChatError):
    """Nothing answers at the URL, or the connection broke."""

    cause = "server unreachable"


class UnknownModelError(ChatError):
    """The server has no model of that name."""

    cause = "unknown model"


class NoWorkerError(ChatError):
    """The model is known to the gateway, but nobody serves it at the moment."""

    cause = "no worker"


class WorkerLostError(ChatError):
    """The worker that wrote the answer has gone, and no other could go on."""

    cause = "worker lost"


class ContextFullError(ChatError):
    """The conversation and the answer asked for do not fit into the model's context."""

    cause = "context full"


class LimitReachedError(ChatError):
    """The server takes no more requests from this client now (HTTP 429)."""

    cause = "limit reached"


class AnswerTimeoutError(ChatError):
    """Nothing came for longer than the client's time limit."""

    cause = "time-out"


class AccessDeniedError(ChatError):
    """The key is missing, wrong or not allowed to do this (HTTP 401, 403)."""

    cause = "access denied"


class RequestRefusedError(ChatError):
    """The server takes the request for a wrong one (other HTTP 4xx)."""

    cause = "request refused"


class ServerFailedError(ChatError):
    """The server itself failed (HTTP 5xx)."""

    cause = "server failed"


class InvalidAnswerError(ChatError):
    """What came back is no answer of an OpenAI-compatible server, or it was cut off."""

    cause = "invalid answer"


def from_server(error: Any, status: int | None, url: str, model: str | None) -> ChatError:
    """What a server's own error object means; `status` is None for one inside a stream."""
    code, said = str(error.code or ""), _said(error, status)
    # The message of a gateway names the model and what happened already; it goes through as it is.
    known: dict[str, tuple[type[ChatError], str]] = {
        "worker_lost": (WorkerLostError, "ask again, or choose another model meanwhile"),
        "no_worker": (NoWorkerError, "choose another model, or start a worker for this one"),
        "model_not_found": (UnknownModelError, "choose a model that the server lists"),
        "context_length_exceeded": (ContextFullError, "begin a new conversation, or ask for fewer tokens"),
    }
    if code in known:
        kind, remedy = known[code]
        return kind(said, remedy=remedy, model=model)
    whom = f"{url} ({model})" if model else url
    if status == 429 or code in ("rate_limit_exceeded", "insufficient_quota"):
        return LimitReachedError(
            f"{whom} takes no more requests now: {said}", remedy="wait a little, then ask again", model=model
        )
    if status in (401, 403):
        return AccessDeniedError(f"{whom} refused the API key: {said}", remedy="give a valid key", model=model)
    if status == 404:
        return InvalidAnswerError(f"{url} is not the address of an OpenAI-compatible API (HTTP 404).", model=model)
    if status is not None and status < 500:
        return RequestRefusedError(f"{whom} refused the request (HTTP {status}): {said}", model=model)
    where = f" (HTTP {status})" if status else " in the middle of the answer"
    return ServerFailedError(f"{whom} failed{where}: {said}", remedy="ask again; the server's log says more", model=model)


def _said(error: Any, status: int | None) -> str:
    """The server's own message, kept short; a page of HTML is none."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    if not isinstance(message, str):
        message = f"HTTP {status}" if status is not None else str(error.message)
    return message if len(message) <= 500 else message[:499] + "…"


def read_retry_after_s(headers: Mapping[str, str]) -> float | None:
    """What a `Retry-After` asks for, as seconds or as a date (RFC 9110, 10.2.3); None where it is missing or unreadable."""
    given = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", given):
        return float(given)
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except ValueError:
        return None
