"""`Dialect`: one API that answers are asked for and given in.

Invariants: an endpoint is one value of this type, made in one file: what its requests hold, how its answers are written, what
its errors look like. Keys, limits, queues, the log and workers are the same for all, and know of none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from chaccu.serve.gateway.dialects.parameters import Unused, parse_body
from chaccu.serve.gateway.dialects.relayed_request import RelayedChat, RelayedCompletion
from chaccu.serve.gateway.errors import ApiError, ErrorBody
from chaccu.serve.gateway.workers.answer import AnswerPart, AnswerUsage, Job
from chaccu.serve.gateway.workers.choices import WholeAnswer


class AnswerWriter(Protocol):
    """Writes an answer, whole or as events: `opening`, `texts` any number of times, and `ending` or `failure`."""

    def opening(self, first: AnswerPart) -> bytes:
        """The events before any text, once the `first` part is there."""
        ...

    def texts(self, part: AnswerPart) -> bytes:
        """The events of a part's texts; where a request has several answers, of the end of one too."""
        ...

    def ending(self, last: AnswerPart, usage: AnswerUsage) -> bytes:
        """The events after all text; `last` holds no text."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The event of an answer that breaks off after its beginning."""
        ...

    def whole(self, choices: list[WholeAnswer], usage: AnswerUsage) -> bytes:
        """The answer as one object, of as many choices as were asked for."""
        ...


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request. `user` is who asks for an answer, as the request says it."""

    answer_id: str
    job: Job
    writer: AnswerWriter
    streamed: bool
    user: str = ""


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint. Its requests have a `body` beside `unused` parameters; `ask` makes of a body, and all fields, what is to be
    answered, and raises `ApiError`. `is_chat`: its answers are conversations, and logged; `relayed`: what is checked of a
    request that goes to the same path of an upstream, None where none may. `answer` and `error` describe what is written.
    """

    path: str
    summary: str
    body: type[msgspec.Struct]
    unused: Unused
    ask: Callable[[Any, dict[str, Any]], Asked]
    is_chat: bool
    relayed: type[RelayedChat] | type[RelayedCompletion] | None = None
    answer: type[msgspec.Struct] | None = None
    error: type[msgspec.Struct] = ErrorBody
    write_error: Callable[[ApiError], bytes] = ApiError.to_json

    def read(self, fields: dict[str, Any]) -> Asked:
        """The checked request. Raises `ApiError` naming the parameter that is wrong."""
        return self.ask(parse_body(fields, self.body, self.unused), fields)
