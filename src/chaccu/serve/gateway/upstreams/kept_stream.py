"""`KeptStream`: an event stream on its way to the client, which remembers what has left.

Invariants: it leaves by whole lines, so that what has left ends between two; as long as the first upstream sends, bytes leave
unchanged and unread. What is remembered is bounded: a stream with more cannot be gone on with. It ignores connections.
"""

from __future__ import annotations

from chaccu.serve.gateway.upstreams.continuation import Continuation, plan_continuation
from chaccu.serve.gateway.upstreams.continued_stream import ContinuedStream
from chaccu.serve.gateway.upstreams.event_lines import DONE_DATA
from chaccu.serve.gateway.upstreams.sent_stream import CannotContinueError
from chaccu.serve.gateway.upstreams.whole_lines import WholeLines

_MAX_KEPT_BYTES = 2**20
# The last event and an empty line that came by itself.
_END_PIECES = 2


class KeptStream:
    """The stream that answers `request` at `endpoint`. `came_bytes` grows with what comes."""

    def __init__(self, endpoint: str, request: bytes) -> None:
        self.came_bytes = 0
        self._endpoint = endpoint
        self._request = request
        self._lines = WholeLines()
        self._kept: list[bytes] = []
        self._continued: ContinuedStream | None = None
        self._may_prefix = True

    def take(self, data: bytes) -> bytes:
        """What leaves once `data` has come. Raises `CannotContinueError` for what does not fit behind what has left."""
        self.came_bytes += len(data)
        data = self._lines.take(data)
        if self._continued is not None:
            data = self._continued.take(data)
        if data:
            self._kept.append(data)
            if self.came_bytes > _MAX_KEPT_BYTES:
                del self._kept[:-_END_PIECES]
        return data

    def finish(self, data: bytes) -> bytes:
        """The same for the last bytes."""
        data = self.take(data)
        rest = self._lines.take_rest()
        if self._continued is not None:
            rest = self._continued.take(rest)
        self._kept.append(rest)
        return data + rest

    @property
    def is_done(self) -> bool:
        """Whether its end has been said."""
        return bool(self._kept) and DONE_DATA in b"".join(self._kept[-_END_PIECES:])

    @property
    def can_go_on(self) -> bool:
        """Whether another upstream could go on with it."""
        try:
            self.plan()
        except CannotContinueError:
            return False
        return True

    def plan(self) -> Continuation:
        """How it can go on with another upstream. Raises `CannotContinueError`."""
        if self.came_bytes > _MAX_KEPT_BYTES:
            raise CannotContinueError(f"it is too long to go on with: {self.came_bytes:,} bytes; {_MAX_KEPT_BYTES:,} are kept")
        return plan_continuation(self._endpoint, self._request, b"".join(self._kept), may_prefix=self._may_prefix)

    def go_on(self, plan: Continuation) -> None:
        """Its opening leaves; what comes from now on is the next upstream's."""
        self._kept.append(plan.opening)
        self._continued = plan.stream
        # What is read has to be whole, where what only passes need not be.
        self._lines = WholeLines(_MAX_KEPT_BYTES)

    def refuse_prefix(self) -> None:
        """An upstream does not go on from a text: the next plan is to do without."""
        self._may_prefix = False
