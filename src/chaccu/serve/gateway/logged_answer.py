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
    """The answers to `job` as workers give them, one line each."""

    def __init__(self, answer_id: str, job: Job, user: str) -> None:
        self._id = answer_id
        self._job = job
        self._user = user
        self._texts: list[list[str]] = [[] for _ in range(job.n)]
        self._finish_reasons = [CANCELLED] * job.n

    def take(self, part: AnswerPart) -> None:
        """The next part."""
        self._texts[part.index].extend(part.texts)
        if part.finish_reason is not None:
            self._finish_reasons[part.index] = part.finish_reason

    def fail(self, error: ApiError) -> None:
        """What has not ended by now ended with an error."""
        why = error.code or FAILED
        self._finish_reasons = [why if reason == CANCELLED else reason for reason in self._finish_reasons]

    @property
    def is_answered(self) -> bool:
        return any(self._is_answered(index) for index in range(self._job.n))

    @property
    def size(self) -> int:
        conversation = self._job.conversation
        asked = 0 if conversation is None else sum(len(message.content or "") for message in conversation.messages)
        return asked + sum(len(text) for texts in self._texts for text in texts)

    def lines(self, time: str) -> list[LogLine]:
        conversation = self._job.conversation
        if conversation is None:
            return []
        messages = conversation.messages
        if messages[-1].content is None:
            # The place of a reply that the client has begun.
            messages = messages[:-1]
        return [
            LogLine(
                id=self._id,
                time=time,
                model=self._job.model,
                finish_reason=self._finish_reasons[index],
                system=conversation.system,
                messages=(*messages, Message("assistant", self._job.begun + "".join(self._texts[index]))),
                user=self._user,
            )
            for index in range(self._job.n)
            if self._is_answered(index)
        ]

    def _is_answered(self, index: int) -> bool:
        return bool(self._texts[index]) or self._finish_reasons[index] in ("stop", "length")
