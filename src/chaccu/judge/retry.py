"""`RetryPolicy`: which failed requests to a judge are sent again, and when.

Invariants: what a server asks for by Retry-After is the least wait; waits carry jitter, so that requests which failed
together do not come back together. It holds no clock and draws no chance: both are handed in.
"""

from __future__ import annotations

import asyncio
import random
import time

import msgspec

from chaccu.client import (
    AnswerTimeoutError,
    ChatError,
    ContextFullError,
    LimitReachedError,
    NoWorkerError,
    RequestRefusedError,
    ServerFailedError,
    ServerUnreachableError,
    WorkerLostError,
)

# Failures that may pass by themselves; the others come again however often one asks.
PASSING = (
    AnswerTimeoutError,
    LimitReachedError,
    NoWorkerError,
    ServerFailedError,
    ServerUnreachableError,
    WorkerLostError,
)
# These speak of the one request, not of the server: however many fail, the next may not.
OF_THE_REQUEST = (ContextFullError, RequestRefusedError)


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """`tries`: requests in all. The wait doubles from `first_wait_s` to `longest_wait_s`; a server that wants to be left alone
    for longer than `patience_s` is given up."""

    tries: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    patience_s: float = 600.0

    def wait_s(self, error: ChatError, tried: int, draw: float) -> float | None:
        """Seconds to wait after request number `tried` (from 1) ended in `error`; None: do not send it again.

        `draw`: from 0 to 1, for the jitter.
        """
        if not isinstance(error, PASSING) or tried >= self.tries:
            return None
        if error.retry_after_s is None:
            return self.step_s(tried, draw)
        return None if error.retry_after_s > self.patience_s else error.retry_after_s + self.first_wait_s * draw

    def step_s(self, tried: int, draw: float) -> float:
        """The wait that the count of requests alone asks for: between half of its step and the whole of it."""
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** (tried - 1)) * (1 + draw) / 2


class Clock:
    """Time and chance as they are; tests hand in their own."""

    def now_s(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    async def sleep(self, wait_s: float) -> None:
        """Let `wait_s` seconds pass."""
        await asyncio.sleep(wait_s)

    def draw(self) -> float:
        """A number from 0 to 1 by chance."""
        return random.random()
