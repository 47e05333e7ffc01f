"""How an answer is written as one of Anthropic's messages, whole or as its events, and an error as its object.

Invariant: a stream's events are of one block at a time, and blocks are numbered from 0. It ignores what was asked.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

import msgspec

from chaccu.serve.gateway.dialects.event_stream import TEXT, event_around_text, write_event
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.workers.answer import AnswerPart, AnswerUsage
from chaccu.serve.gateway.workers.choices import WholeAnswer

_ERROR_TYPES = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        408: "timeout_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
)
_STOP_REASONS = MappingProxyType({"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"})


class MessageUsage(msgspec.Struct, frozen=True):
    """Tokens of the prompt and of the answer."""

    input_tokens: int
    output_tokens: int


class AnswerBlock(msgspec.Struct, frozen=True, tag="text"):
    """The answer's text."""

    text: str


class CalledTool(msgspec.Struct, frozen=True, tag="tool_use"):
    """A tool that is to be used."""

    id: str
    name: str
    input: dict[str, Any]


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer; one without text has no block of text."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock | CalledTool] = []
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageWriter:
    """Writes one answer as a message, whole or as its events."""

    def __init__(self, answer_id: str, model: str) -> None:
        self._id = answer_id
        self._model = model
        # The block that events are of now: the text, or a call by its number.
        self._block: int | Literal["text"] | None = None
        self._index = -1
        self._before = self._after = b""

    def opening(self, first: AnswerPart) -> bytes:
        """The events before any text."""
        begun = AnswerMessage(id=self._id, model=self._model, usage=MessageUsage(first.prompt_tokens, 0))
        return write_event("message_start", {"message": begun})

    def texts(self, part: AnswerPart) -> bytes:
        """One event a text, and one a part of a call; between blocks those of their ends and beginnings."""
        events = b""
        if part.texts:
            events = self._enter("text", AnswerBlock(""))
            if events:
                delta = {"index": self._index, "delta": {"type": "text_delta", "text": TEXT}}
                self._before, self._after = event_around_text("content_block_delta", delta)
            events += b"".join(self._before + msgspec.json.encode(text) + self._after for text in part.texts)
        for call in part.tool_calls:
            events += self._enter(call.index, CalledTool(call.id, call.name, {}))
            json = {"type": "input_json_delta", "partial_json": call.arguments}
            events += write_event("content_block_delta", {"index": self._index, "delta": json})
        return events

    def ending(self, last: AnswerPart, usage: AnswerUsage) -> bytes:
        """The events after all text."""
        reason, sequence = _stop_of(last)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        ended = write_event("message_delta", {"delta": delta, "usage": _usage(usage)})
        return self._leave() + ended + write_event("message_stop", {})

    def failure(self, error: ApiError) -> bytes:
        """The event of an answer that breaks off."""
        return b"event: error\ndata: %b\n\n" % write_error(error)

    def whole(self, choices: list[WholeAnswer], usage: AnswerUsage) -> bytes:
        """The answer as one object. Raises `ApiError` where the model has called a tool with what is no input."""
        text, last = choices[0].text, choices[0].last
        reason, sequence = _stop_of(last)
        blocks: list[AnswerBlock | CalledTool] = [AnswerBlock(text)] if text else []
        blocks += [CalledTool(call.id, call.name, call.read_arguments()) for call in choices[0].tool_calls]
        answer = AnswerMessage(
            id=self._id,
            model=self._model,
            content=blocks,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=_usage(usage),
        )
        return msgspec.json.encode(answer)

    def _enter(self, block: int | Literal["text"], begun: AnswerBlock | CalledTool) -> bytes:
        """The events that lead to `block`; none within it."""
        if block == self._block:
            return b""
        left = self._leave()
        self._block = block
        self._index += 1
        return left + write_event("content_block_start", {"index": self._index, "content_block": begun})

    def _leave(self) -> bytes:
        block, self._block = self._block, None
        return b"" if block is None else write_event("content_block_stop", {"index": self._index})


class ErrorCode(msgspec.Struct, frozen=True):
    """`error_code`: the code that the other endpoints name."""

    error_code: str


class MessagesError(msgspec.Struct, frozen=True):
    """What is wrong."""

    type: str
    message: str
    details: ErrorCode | None = None


class MessagesErrorBody(msgspec.Struct, frozen=True):
    """The body of an error."""

    error: MessagesError
    type: Literal["error"] = "error"


def write_error(error: ApiError) -> bytes:
    """`{"type": "error", "error": {…}}`."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    details = None if error.code is None else ErrorCode(error.code)
    return msgspec.json.encode(MessagesErrorBody(MessagesError(kind, error.message, details)))


def _stop_of(last: AnswerPart) -> tuple[Any, str | None]:
    """The stop reason, and the stop sequence if one was it."""
    if last.stopped_by is not None:
        return "stop_sequence", last.stopped_by
    return _STOP_REASONS[last.finish_reason or "stop"], None


def _usage(usage: AnswerUsage) -> MessageUsage:
    return MessageUsage(usage.prompt_tokens, usage.completion_tokens)
