"""How fast one host is asked, and when a failed request is tried again: policy without a network, on an injected clock.

Invariants: two requests to a host begin at least the interval apart; while a host has asked for quiet (Retry-After), none
begins.
"""

from __future__ import annotations

from email.utils import parsedate_to_datetime

_FIRST_WAIT_S = 0.5
_MOST_WAIT_S = 60.0


class HostPace:
    """The turns of one host. Times are seconds of a monotonic clock."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next_s = 0.0

    def slow_to(self, interval_s: float) -> None:
        """Keep at least `interval_s` between requests, as robots.txt may ask."""
        self._interval_s = max(self._interval_s, interval_s)

    def wait_s(self, now_s: float) -> float:
        """How long until a request may begin; 0 or less is now."""
        return self._next_s - now_s

    def begin(self, now_s: float) -> None:
        """A request begins."""
        self._next_s = max(self._next_s, now_s) + self._interval_s

    def be_quiet(self, now_s: float, wait_s: float) -> None:
        """No turn before `wait_s` from now."""
        self._next_s = max(self._next_s, now_s + wait_s)


def wait_before_retry(attempt: int) -> float:
    """Seconds before try number `attempt` + 1, doubling from half a second up to a minute; `attempt` counts from 1."""
    return min(_FIRST_WAIT_S * 2.0 ** (attempt - 1), _MOST_WAIT_S)


def parse_retry_after(value: str | None, now_epoch_s: float) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number, or an HTTP date; None when it is missing or neither."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now_epoch_s)
    except (ValueError, OverflowError):
        return None
