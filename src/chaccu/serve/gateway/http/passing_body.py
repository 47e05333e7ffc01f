"""`PassingBody`: an upstream's response on its way to the client, by whichever path it goes.

Invariants: bytes leave unchanged and in order; what the log is to keep is noted as it passes, and why a response did not come
to its end. It ignores how bytes are sent.
"""

from __future__ import annotations

from chaccu.serve.gateway.dialects.responses import error_event
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.records.relayed_answer import RelayedAnswer
from chaccu.serve.gateway.upstreams.connection import ResponseHead


class PassingBody:
    """The body that follows `head`; `logged` keeps it for the log."""

    def __init__(self, head: ResponseHead, logged: RelayedAnswer | None) -> None:
        self._logged = logged
        self._is_event_stream = head.is_event_stream
        if logged is not None:
            logged.begin(head.status, head.content_type)

    def take(self, piece: bytes) -> None:
        """The next piece, which leaves."""
        if self._logged is not None and piece:
            self._logged.take(piece)

    def finish(self) -> None:
        """All has come."""
        if self._logged is not None:
            self._logged.broken_off = None

    def break_off(self, lost: ApiError) -> bytes | None:
        """What says that there will be no more: an event, or None where only the connection's end can say it."""
        if self._logged is not None:
            self._logged.broken_off = lost.code
        # The empty line ends the event that was under way.
        return None if not self._is_event_stream else b"\n" + error_event(lost.to_json())
