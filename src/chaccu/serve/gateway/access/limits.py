"""Limits of a key: requests and tokens a minute, and requests at once.

Pure policy on an injected clock. Invariants: a refused request takes nothing from any limit; a limit that was changed holds for
the next request, while requests under way stay counted. Tokens are taken by an estimate, a minute's worth at most, when a
request begins, and put right when it ends: a key goes into debt by what an answer was longer than its estimate, and pays before
the next request. It ignores who has the key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from chaccu.serve.gateway.errors import ApiError

Limit = Annotated[int, msgspec.Meta(ge=1, le=10**12)]
HeaderPairs = list[tuple[bytes, bytes]]


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """None limits nothing. `concurrent`: requests at once."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None


class TokenBucket:
    """A bucket that holds a minute's worth and fills evenly; it may be drawn below zero.

    Source: the token bucket as a meter of ITU-T I.371 (leaky bucket, turned round).
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at_s = clock()

    @property
    def level(self) -> float:
        """What is in it now."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at_s) * self.per_minute / 60)
        self._at_s = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken, 0 for now; an amount above the whole bucket needs a full one."""
        # Below a millionth of a token, what is missing is the clock's rounding.
        missing = min(amount, self.per_minute) - self.level
        return missing * 60 / self.per_minute if missing > 1e-6 else 0.0

    def take(self, amount: float) -> None:
        """Take `amount`, or put a negative one back."""
        self._level = min(self.per_minute, self.level - amount)

    def set_level(self, level: float) -> None:
        """So much is in it now, as another has counted."""
        self._level = min(self.per_minute, level)
        self._at_s = self._clock()


class Meter:
    """One key's use of its limits."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.under_way = 0
        self.limits = limits
        self._requests, self._tokens = self._buckets()

    def change(self, limits: Limits) -> None:
        """Other limits from now on; buckets start full."""
        self.limits = limits
        self._requests, self._tokens = self._buckets()

    @property
    def under_way_everywhere(self) -> int:
        """Requests under way, those on other gateways too where the limits are shared."""
        return self.under_way

    def decides_now(self, tokens: int) -> bool:
        """Whether `begin` knows by itself if a request of about `tokens` may begin."""
        return True

    def begin(self, tokens: int) -> int:
        """A request of about `tokens` begins; returns how many are taken for it.

        Raises `ApiError` (429), and takes nothing, when a limit is reached.
        """
        self.check(tokens)
        return self._take(tokens)

    def check(self, tokens: int) -> None:
        """Raise `ApiError` (429) when a limit is reached."""
        concurrent = self.limits.concurrent
        if concurrent is not None and self.under_way_everywhere >= concurrent:
            raise self._refusal(
                f"{self.under_way_everywhere} requests of this key are under way; its limit is {concurrent}.", "requests", 1
            )
        if self._requests is not None and (wait_s := self._requests.wait_s(1)):
            limit = self._requests.per_minute
            raise self._refusal(f"the limit of this key is {limit:,} requests a minute.", "requests", wait_s)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(tokens)):
            limit = self._tokens.per_minute
            raise self._refusal(
                f"the limit of this key is {limit:,} tokens a minute; this request is for about {tokens:,}.", "tokens", wait_s
            )

    def _take(self, tokens: int) -> int:
        self.under_way += 1
        if self._requests is not None:
            self._requests.take(1)
        if self._tokens is None:
            return 0
        reserved = min(tokens, self._tokens.per_minute)
        self._tokens.take(reserved)
        return reserved

    def end(self, reserved_tokens: int, used_tokens: int | None) -> None:
        """A request ends for which `reserved_tokens` were taken; None leaves these as what it used."""
        self.under_way -= 1
        if self._tokens is not None and used_tokens is not None:
            self._tokens.take(used_tokens - reserved_tokens)

    def headers(self) -> HeaderPairs:
        """OpenAI's headers: limit, what is left and when the bucket is full again."""
        pairs: HeaderPairs = []
        for name, bucket in ((b"requests", self._requests), (b"tokens", self._tokens)):
            if bucket is not None:
                left = max(0, int(bucket.level))
                pairs += [
                    (b"x-ratelimit-limit-" + name, b"%d" % bucket.per_minute),
                    (b"x-ratelimit-remaining-" + name, b"%d" % left),
                    (b"x-ratelimit-reset-" + name, b"%.3fs" % bucket.wait_s(bucket.per_minute)),
                ]
        return pairs

    def _refusal(self, message: str, kind: Literal["requests", "tokens"], wait_s: float) -> ApiError:
        headers = {name.decode(): value.decode() for name, value in self.headers()}
        headers["retry-after"] = str(max(1, math.ceil(wait_s)))
        again = f" Try again in {headers['retry-after']} s."
        return ApiError(429, message + again, kind=kind, code="rate_limit_exceeded", headers=headers)

    def _buckets(self) -> tuple[TokenBucket | None, TokenBucket | None]:
        counts = self.limits.requests_per_minute, self.limits.tokens_per_minute
        requests, tokens = (None if count is None else TokenBucket(count, self._clock) for count in counts)
        return requests, tokens
