"""`Drain`: whether the gateway is about to end.

Invariant: once that is so nothing new is taken, and `/ready` says no. It ignores what is under way, which goes on.
"""

from __future__ import annotations

from chaccu.serve.gateway.errors import ApiError


class Drain:
    """One gateway's, known to all that take requests."""

    def __init__(self) -> None:
        self.has_begun = False

    def check(self) -> None:
        """Raise `ApiError` when nothing new is taken (503)."""
        if self.has_begun:
            message = "this gateway is ending and takes nothing new; ask again, or another one."
            raise ApiError(503, message, kind="service_unavailable", code="draining")
