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

from chaccu.conversation import Message, ToolCallDelta
from chaccu.errors import ServeError
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.workers.answer import AnswerPart, Job
from chaccu.serve.gateway.workers.chat_history import read_history
from chaccu.serve.gateway.workers.tool_calls import join_calls

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
        self._called: list[list[ToolCallDelta]] = [[] for _ in range(job.n)]
        self._finish_reasons = [CANCELLED] * job.n

    def take(self, part: AnswerPart) -> None:
        """The next part."""
        self._texts[part.index].extend(part.texts)
        self._called[part.index].extend(part.tool_calls)
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
        conversation, chat = self._job.conversation, self._job.chat
        asked = 0 if conversation is None else sum(len(message.content or "") for message in conversation.messages)
        asked += 0 if chat is None else sum(len(str(message)) for message in chat.messages)
        asked += sum(len(call.arguments) for called in self._called for call in called)
        return asked + sum(len(text) for texts in self._texts for text in texts)

    def lines(self, time: str) -> list[LogLine]:
        if self._job.conversation is None and self._job.chat is None:
            return []
        system, messages = self._said()
        return [
            LogLine(
                id=self._id,
                time=time,
                model=self._job.model,
                finish_reason=self._finish_reasons[index],
                system=system,
                messages=[*messages, self._answer(index)],
                user=self._user,
            )
            for index in range(self._job.n)
            if self._is_answered(index)
        ]

    def _said(self) -> tuple[str | None, Sequence[Any]]:
        """The system text and the messages before the answer."""
        job = self._job
        if job.chat is not None:
            return read_history(job.chat.messages)
        assert job.conversation is not None
        messages = job.conversation.messages
        # The last one may be the place of a reply that the client has begun.
        return job.conversation.system, messages[:-1] if messages[-1].content is None else messages

    def _answer(self, index: int) -> Message | dict[str, Any]:
        text = self._job.begun + "".join(self._texts[index])
        if not self._called[index]:
            return Message("assistant", text)
        calls = [call.to_openai() for call in join_calls(self._called[index])]
        return {"role": "assistant", "content": text or None, "tool_calls": calls}

    def _is_answered(self, index: int) -> bool:
        given = self._texts[index] or self._called[index]
        return bool(given) or self._finish_reasons[index] in ("stop", "length")
