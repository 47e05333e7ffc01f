"""`ClientLimits`: how much a client may send before its request is whole, and how long it may take over what it owes.

Invariants: whoever sends nothing, little by little, or without end is let go in bounded time and room; a client that waits for
its answer owes nothing. Times come from the caller. It ignores sockets and what is asked.
"""

from __future__ import annotations

from typing import Literal

from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.errors import ApiError

Debt = Literal["request", "head", "body"]

_MAX_HEAD_BYTES = 64 * 1024
_MAX_HEADER_LINES = 200


class ClientLimits:
    """One connection's limits. `owes`: the next request, the rest of a head or of a body, or nothing (None)."""

    def __init__(self, config: GatewayConfig, now_s: float) -> None:
        self.owes: Debt | None = "request"
        self._since_s = now_s
        self._head_bytes = 0
        # How much of an answer waits for the client to read, and since when none of it went.
        self._unread_bytes: int | None = None
        self._unread_since_s = 0.0
        self._unread_limit_s = config.unread_timeout_s
        self._request_limit_s = config.request_timeout_s
        self._limits_s: dict[Debt, float] = {
            "request": config.keep_alive_s,
            "head": config.head_timeout_s,
            "body": config.body_timeout_s,
        }

    def owe(self, what: Debt, now_s: float) -> None:
        """The client owes `what` from now on."""
        self.owes = what
        self._since_s = now_s
        self._head_bytes = 0

    def count_head(self, size_bytes: int) -> ApiError | None:
        """So much has come of a head that is not whole; returns why no more may come."""
        self._head_bytes += size_bytes
        if self._head_bytes <= _MAX_HEAD_BYTES:
            return None
        return _too_large(f"the request's head is longer than {_MAX_HEAD_BYTES:,} bytes, the limit.")

    def count_lines(self, count: int) -> ApiError | None:
        """A head with so many lines is whole; returns why it is none to answer."""
        if count <= _MAX_HEADER_LINES:
            return None
        return _too_large(f"the request has {count:,} headers; {_MAX_HEADER_LINES} is the limit.")

    def is_overdue(self, now_s: float) -> bool:
        """Whether what it owes should have come by now."""
        return self.owes is not None and now_s - self._since_s >= self._limits_s[self.owes]

    def slow(self) -> ApiError:
        """What a client is told that has taken too long over what it owes."""
        assert self.owes is not None
        message = f"the request's {self.owes} was not complete after {self._limits_s[self.owes]:g} s, the limit."
        return ApiError(408, message, kind="invalid_request_error", code="request_timeout")

    def late(self, now_s: float) -> ApiError | None:
        """Why an answer that is under way may not go on, if so; its time counts from the request's head."""
        if not self._request_limit_s or now_s - self._since_s < self._request_limit_s:
            return None
        return answer_late(self._request_limit_s)

    def keep_reading(self) -> None:
        """The client reads."""
        self._unread_bytes = None

    def has_not_read(self, now_s: float, unread_bytes: int) -> bool:
        """Whether it has read nothing for too long, now that so much waits for it."""
        if unread_bytes != self._unread_bytes:
            self._unread_bytes, self._unread_since_s = unread_bytes, now_s
        return now_s - self._unread_since_s >= self._unread_limit_s


def answer_late(limit_s: float) -> ApiError:
    """An answer has taken longer than any may."""
    message = f"the answer was not complete after {limit_s:g} s, the limit."
    return ApiError(504, message, kind="server_error", code="answer_timeout")


def _too_large(message: str) -> ApiError:
    return ApiError(431, message, kind="invalid_request_error", code="headers_too_large")
