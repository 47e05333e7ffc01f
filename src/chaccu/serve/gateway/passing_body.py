"""`PassingBody`: an upstream's response on its way to the client, by whichever path it goes.

Invariants: bytes leave unchanged and in order; an event stream leaves line by line, so that it can be broken off by an event of
our own; what the log is to keep is noted as it passes, and why a response did not come to its end. It ignores how bytes are
sent.
"""

from __future__ import annotations

from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.relayed_answer import RelayedAnswer
from chaccu.serve.gateway.responses import error_event
from chaccu.serve.gateway.upstream_connection import ResponseHead
from chaccu.serve.gateway.whole_lines import WholeLines


class PassingBody:
    """The body that follows `head`; `logged` keeps it for the log."""

    def __init__(self, head: ResponseHead, logged: RelayedAnswer | None) -> None:
        self._logged = logged
        self._lines = WholeLines() if head.is_event_stream else None
        if logged is not None:
            logged.begin(head.status, head.content_type)

    def take(self, piece: bytes) -> bytes:
        """What may leave once `piece` has come."""
        if self._logged is not None and piece:
            self._logged.take(piece)
        return piece if self._lines is None else self._lines.take(piece)

    def finish(self) -> bytes:
        """What is still to leave when all has come."""
        if self._logged is not None:
            self._logged.broken_off = None
        return b"" if self._lines is None else self._lines.take_rest()

    def break_off(self, lost: ApiError) -> bytes | None:
        """What says that there will be no more: an event, or None where only the connection's end can say it."""
        if self._logged is not None:
            self._logged.broken_off = lost.code
        # The empty line ends the event that was under way.
        return None if self._lines is None else b"\n" + error_event(lost.to_json())
