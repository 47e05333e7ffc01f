"""`LeasedMeter`: one gateway's part of a key's limits that several gateways share.

The limits themselves are kept elsewhere (`shared_limits`). A gateway has a lease: a second's worth of requests and tokens and a
few slots in advance, so it decides most requests by itself and at once; what the lease does not cover has to be asked for.

Pure policy on an injected clock. Invariants: while leases are to be had, nothing begins that no lease covers, so all gateways
together give no more than the limits; a lease is given back when the key has been idle for `_IDLE_S`; what an answer was longer
than its estimate is a debt that is settled with the lease. Buckets show what was last heard of all gateways. It ignores how
leases are got.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from chaccu.serve.gateway.access.limits import Limits, Meter
from chaccu.serve.gateway.errors import ApiError

WhenDown = Literal["local", "refuse"]

_LEASES_A_MINUTE = 60
_IDLE_S = 1.0
_SLOTS_A_SPARE = 16
_ROUNDING = 1e-6


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway gives back and asks for, in the order of the script's arguments. `slots_held` replaces what is known of
    this gateway where `is_certain`."""

    requests_back: float = 0.0
    tokens_back: float = 0.0
    requests: int = 0
    requests_more: float = 0
    tokens: int = 0
    tokens_more: float = 0
    slots: int = 0
    slots_more: int = 0
    slots_held: int = 0
    is_certain: bool = False


class Lent(msgspec.Struct, frozen=True, kw_only=True):
    """What there was of it; `slots_elsewhere`: those of other gateways; levels: what is left for all."""

    requests: float
    tokens: float
    slots: int
    slots_elsewhere: int
    requests_level: float
    tokens_level: float


class LeaseState:
    """Whether leases are to be had now, and what happens while they are not: each gateway keeps to the limits by itself, or
    refuses."""

    def __init__(self, when_down: WhenDown) -> None:
        self.when_down = when_down
        self.is_up = True


class LeasedMeter(Meter):
    """One key's use of limits that are shared. `on_urgent` is called when `settle` should not wait."""

    def __init__(
        self, limits: Limits, clock: Callable[[], float], state: LeaseState, on_urgent: Callable[[LeasedMeter], None]
    ) -> None:
        super().__init__(limits, clock)
        self._state = state
        self._on_urgent = on_urgent
        self._requests_lent = 0.0
        self._tokens_lent = 0.0
        self._slots_lent = 0
        self._slots_elsewhere = 0
        self._used_s = clock()

    @property
    def has_lease(self) -> bool:
        """Whether there is anything to settle."""
        return bool(self._requests_lent > 0 or self._tokens_lent or self._slots_lent or self.under_way)

    @property
    def under_way_everywhere(self) -> int:
        return self.under_way + self._slots_elsewhere

    def decides_now(self, tokens: int) -> bool:
        return not self._state.is_up or self._covers(tokens)

    def begin(self, tokens: int) -> int:
        """As `Meter.begin`; raises `ApiError` 503 where there are no leases and this is not to be decided without."""
        if self._state.is_up:
            if not self._covers(tokens):
                self.check(tokens)
                # There is enough in all, and other gateways have it for the moment.
                raise self._refusal("what is left of this key's limits is on other gateways.", "requests", 1)
        else:
            if self.limits != Limits() and self._state.when_down == "refuse":
                raise ApiError(
                    503,
                    "the limits of this key cannot be checked now, for what the gateways share is not reachable.",
                    kind="service_unavailable",
                    code="limits_unavailable",
                    headers={"retry-after": "1"},
                )
            self.check(tokens)
        reserved = self._take(tokens)
        if self._state.is_up:
            self._requests_lent -= 1 if self._requests is not None else 0
            self._tokens_lent -= reserved
        self._used_s = self._clock()
        return reserved

    def end(self, reserved_tokens: int, used_tokens: int | None) -> None:
        super().end(reserved_tokens, used_tokens)
        if self._state.is_up:
            if self._tokens is not None and used_tokens is not None:
                self._tokens_lent -= used_tokens - reserved_tokens
            if self._tokens_lent < 0 or self._slots_lent > self.under_way + self._spare():
                self._on_urgent(self)

    def change(self, limits: Limits) -> None:
        super().change(limits)
        self._requests_lent = self._tokens_lent = 0.0

    def ask(self, tokens: int, *, is_first: bool) -> Asked:
        """Everything is given back by the first of the asks that leave together; each wants one request of about `tokens`."""
        limits = self.limits
        asked = Asked(
            requests=1,
            requests_more=_lease(limits.requests_per_minute),
            tokens=min(tokens, limits.tokens_per_minute or 0),
            tokens_more=_lease(limits.tokens_per_minute),
            slots=1,
            slots_more=self._spare(),
            slots_held=self.under_way,
        )
        if not is_first:
            return asked
        asked = msgspec.structs.replace(
            asked, requests_back=self._requests_lent, tokens_back=self._tokens_lent, is_certain=True
        )
        self._requests_lent = self._tokens_lent = 0.0
        self._slots_lent = self.under_way
        return asked

    def settle(self, *, is_last: bool = False) -> Asked:
        """What the lease has too much is given back, all of it where the key is idle or this `is_last`; what it has too little
        is asked for."""
        is_idle = is_last or self._clock() - self._used_s > _IDLE_S
        limits = Limits() if is_idle else self.limits
        requests_back, requests_more = _even(self._requests_lent, _lease(limits.requests_per_minute))
        tokens_back, tokens_more = _even(self._tokens_lent, _lease(limits.tokens_per_minute))
        wanted = 0 if is_last else self.under_way + (0 if is_idle else self._spare())
        held = 0 if is_last else max(self.under_way, min(self._slots_lent, wanted))
        self._requests_lent -= requests_back
        self._tokens_lent -= tokens_back
        self._slots_lent = held
        return Asked(
            requests_back=requests_back,
            requests_more=requests_more,
            tokens_back=tokens_back,
            tokens_more=tokens_more,
            slots_more=wanted - held,
            slots_held=held,
            is_certain=True,
        )

    def take_lease(self, lent: Lent) -> None:
        """What `ask` or `settle` has got."""
        self._requests_lent += lent.requests
        self._tokens_lent += lent.tokens
        self._slots_lent += lent.slots
        self._slots_elsewhere = lent.slots_elsewhere
        if self._requests is not None:
            self._requests.set_level(lent.requests_level + self._requests_lent)
        if self._tokens is not None:
            self._tokens.set_level(lent.tokens_level + self._tokens_lent)

    def lose_lease(self) -> None:
        """Leases are not to be had: this gateway goes on from what it has last heard, as if it were the only one."""
        self._requests_lent = self._tokens_lent = 0.0
        self._slots_lent = self._slots_elsewhere = 0

    @property
    def lacks_a_slot(self) -> bool:
        """Whether all slots are taken, some of them elsewhere."""
        return self._slots_elsewhere > 0 and self.limits.concurrent is not None and self.under_way >= self._slots_lent

    def _covers(self, tokens: int) -> bool:
        limits = self.limits
        if limits.requests_per_minute is not None and self._requests_lent + _ROUNDING < 1:
            return False
        needed = min(tokens, limits.tokens_per_minute or 0)
        if needed and self._tokens_lent + _ROUNDING < needed:
            return False
        return limits.concurrent is None or self.under_way < self._slots_lent

    def _spare(self) -> int:
        return (self.limits.concurrent or 0) // _SLOTS_A_SPARE


def _lease(per_minute: int | None) -> int:
    """A second's worth, of whole requests and tokens."""
    return (per_minute or 0) // _LEASES_A_MINUTE


def _even(lent: float, wanted: float) -> tuple[float, float]:
    """What to give back, a debt as a negative amount, and what more to ask for."""
    if lent < 0:
        return lent, wanted
    return max(0.0, lent - wanted), max(0.0, wanted - lent)
