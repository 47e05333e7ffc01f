"""`FastAnswer`: an upstream's response on the fast path, from its connection to the client's.

Invariants: bytes leave as they came, the head with the first of them; when the client has gone, so has the request to the
upstream; whatever ends the answer, it is noted, paid for and logged once. It ignores what the bytes mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaccu.serve.gateway.errors import CLIENT_LEFT, ApiError
from chaccu.serve.gateway.http.admission import Admitted
from chaccu.serve.gateway.http.passing_body import PassingBody
from chaccu.serve.gateway.http.request_note import RequestNote
from chaccu.serve.gateway.http.until_disconnect import NOT_BUFFERED
from chaccu.serve.gateway.records.conversation_log import ConversationLog
from chaccu.serve.gateway.records.relayed_answer import RelayedAnswer
from chaccu.serve.gateway.upstreams.connection import ResponseHead
from chaccu.serve.gateway.upstreams.exchange import Exchange

if TYPE_CHECKING:
    from chaccu.serve.gateway.http.front import Front


class FastAnswer:
    """One answer on the fast path, as the receiver of the upstream's response."""

    def __init__(
        self,
        front: Front,
        log: ConversationLog | None,
        admitted: Admitted,
        logged: RelayedAnswer | None,
        note: RequestNote,
    ) -> None:
        self.exchange: Exchange | None = None
        self._front = front
        self._log = log
        self._logged = logged
        self._admitted = admitted
        self._note = note
        self._head: ResponseHead | None = None
        self._unsent = b""
        self._chunked = True
        self._passing: PassingBody | None = None
        # Whether the next piece is looked at: the first one is noted, and all are where they are logged.
        self._looks = True

    def begin(self, head: ResponseHead) -> None:
        self._head = head
        self._chunked = head.length_bytes is None
        self._passing = PassingBody(head, self._logged)
        front = self._front
        headers = [*head.headers, *self._admitted.headers, *self._note.headers, *NOT_BUFFERED]
        # It leaves with the first bytes of the body.
        self._unsent = front.write_head(head.status, headers, head.length_bytes, keep_alive=front.keeps_alive)

    def deliver(self, body: bytes) -> None:
        if body and self._looks:
            self._take(body)
        self._front.transport.write(self._encode(body))

    def finish(self, body: bytes) -> None:
        assert self._passing is not None
        if body and self._looks:
            self._take(body)
        self._passing.finish()
        data = self._encode(body)
        self._front.transport.write(data + b"0\r\n\r\n" if self._chunked else data)
        assert self._head is not None
        self._end(self._head.status)
        self._front.end_answer()

    def break_off(self, lost: ApiError) -> None:
        """The gateway gives up; the client is told why as well as can be."""
        if self.exchange is not None:
            self.exchange.cancel()
        self.fail(lost)

    def fail(self, lost: ApiError) -> None:
        front = self._front
        said = self._passing.break_off(lost) if self._passing is not None else None
        self._note.fail(lost)
        self._end(lost.status)
        if self._passing is None:
            more = [*self._admitted.headers, *self._note.headers]
            front.transport.write(front.write_whole(lost.status, lost.to_json(), keep_alive=front.keeps_alive, more=more))
            front.end_answer()
        elif said is not None:
            front.transport.write(self._encode(said) + b"0\r\n\r\n")
            front.end_answer()
        else:
            front.break_answer()

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        if self.exchange is not None:
            self.exchange.cancel()
        self._end(CLIENT_LEFT)

    def _take(self, body: bytes) -> None:
        """Note and keep what has come."""
        self._note.note_text()
        self._looks = self._logged is not None
        assert self._passing is not None
        self._passing.take(body)

    def _encode(self, body: bytes) -> bytes:
        unsent, self._unsent = self._unsent, b""
        if not body:
            return unsent
        return b"%b%x\r\n%b\r\n" % (unsent, len(body), body) if self._chunked else unsent + body

    def _end(self, status: int) -> None:
        # Freed at once, not by the next collection.
        self.exchange = None
        self._admitted.close(status)
        self._note.close(status)
        if self._log is not None and self._logged is not None:
            self._log.add(self._logged)
