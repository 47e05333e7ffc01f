"""`ObservedApp`: the gateway's app, with a note of each request and its id on each answer.

Invariants: no answer leaves without the request's id, that of a crash neither; a note is closed before the last piece of the
answer leaves, so whoever has the answer finds it counted. What browsers ask before a request (CORS) is answered here, for no
part of the app needs to know. It ignores what is asked, and WebSockets.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chaccu.serve.gateway.errors import CLIENT_LEFT
from chaccu.serve.gateway.http.request_note import Observer, RequestNote

_NOTE = "chaccu.note"
_NO_CONTENT = 204


class ObservedApp:
    """`app` with notes by `observer`."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = scope[_NOTE] = self._observer.begin(scope["headers"], scope["method"], scope["path"])

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *note.headers]
            elif not message.get("more_body", False):
                note.close(note.status)
            await send(message)

        allowed = self._observer.cors.preflight(scope["method"], scope["headers"])
        if allowed is not None:
            await send_noted({"type": "http.response.start", "status": _NO_CONTENT, "headers": allowed})
            await send_noted({"type": "http.response.body"})
            return
        try:
            await self._app(scope, receive, send_noted)
        except Exception:
            note.status, note.end = 500, "internal_error"
            raise
        finally:
            # Without its last piece the answer has broken off; as a rule the client did.
            note.close(note.status if note.status and note.end is not None else CLIENT_LEFT)


def note_of(scope: Scope) -> RequestNote:
    """The note of the request that `scope` is of."""
    note: RequestNote = scope[_NOTE]
    return note
