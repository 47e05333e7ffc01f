"""What the log says of an answer: collected while it is given, made into lines afterwards.

Invariants: `finish_reason` is the model's own only where the model has ended the answer; one that broke off says why instead
(`cancelled`: nobody waited for the rest). While an answer is given its texts are only kept; everything else is done by the
thread that writes. No header, key or setting of a request gets here but its `user`. Answers of upstreams are in
`relayed_answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from chaccu.conversation import Message
from chaccu.errors import ServeError
from chaccu.serve.gateway.answer import AnswerPart, Job
from chaccu.serve.gateway.errors import ApiError

CANCELLED = "cancelled"
FAILED = "failed"


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer with the conversation before it. `finish_reason` is null when an upstream gave none; `time` is when the
    answer ended."""

    id: str
    time: str
    model: str
    finish_reason: str | None
    system: str | None = None
    messages: Sequence[Any]
    user: str = ""


class UnreadableAnswerError(ServeError):
    """An upstream sent something that is no chat completion."""


class LoggedAnswer(Protocol):
    """An answer for the log, which does not change any more."""

    @property
    def is_answered(self) -> bool:
        """Whether an answer was begun at all."""
        ...

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        ...

    def lines(self, time: str) -> list[LogLine]:
        """One line a choice; none when nothing was answered. Raises `UnreadableAnswerError`."""
        ...


class WorkerAnswer:
    """The answer to `job` as workers give it; `finish_reason` changes when it ends."""

    def __init__(self, answer_id: str, job: Job, user: str) -> None:
        self.finish_reason = CANCELLED
        self._id = answer_id
        self._job = job
        self._user = user
        self._texts: list[str] = []

    def take(self, part: AnswerPart) -> None:
        """The next part."""
        self._texts.extend(part.texts)
        if part.finish_reason is not None:
            self.finish_reason = part.finish_reason

    def fail(self, error: ApiError) -> None:
        """The answer ended with an error."""
        self.finish_reason = error.code or FAILED

    @property
    def is_answered(self) -> bool:
        return bool(self._texts) or self.finish_reason in ("stop", "length")

    @property
    def size(self) -> int:
        conversation = self._job.conversation
        asked = 0 if conversation is None else sum(len(message.content or "") for message in conversation.messages)
        return asked + sum(map(len, self._texts))

    def lines(self, time: str) -> list[LogLine]:
        conversation = self._job.conversation
        if conversation is None:
            return []
        messages = conversation.messages
        if messages[-1].content is None:
            # The place of a reply that the client has begun.
            messages = messages[:-1]
        answer = Message("assistant", self._job.begun + "".join(self._texts))
        line = LogLine(
            id=self._id,
            time=time,
            model=self._job.model,
            finish_reason=self.finish_reason,
            system=conversation.system,
            messages=(*messages, answer),
            user=self._user,
        )
        return [line]
