"""How an answer is written as one of OpenAI's Responses, whole or as its events.

Invariants: events are numbered from 0 without a gap; a stream ends with `response.completed` or `response.incomplete`, or
breaks off with `response.failed` and an `error` event. It ignores what was asked.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

import msgspec

from chaccu.serve.gateway.answer import AnswerPart, AnswerUsage
from chaccu.serve.gateway.choices import WholeAnswer
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.event_stream import TEXT, event_around_text, write_event

# What the other endpoints call them.
_NAMES = {"messages": "input", "response_format": "text.format"}


class OutputText(msgspec.Struct, frozen=True):
    """The answer's text."""

    text: str
    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer as a message."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText] = []


class CachedTokens(msgspec.Struct, frozen=True):
    """Not counted here."""

    cached_tokens: int = 0


class ReasoningTokens(msgspec.Struct, frozen=True):
    """Not counted here."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens of the prompt and of the answer."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens_details: ReasoningTokens = ReasoningTokens()


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(msgspec.Struct, frozen=True):
    """Why an answer broke off; `code` is one of OpenAI's, the `error` event behind it has ours."""

    message: str
    code: str = "server_error"


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, and what was asked for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str = "auto"
    tools: list[Any] = []
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class ResponseWriter:
    """Writes one answer as a response, whole or as its events; `begun` is the response before any text."""

    def __init__(self, begun: ResponseObject) -> None:
        self._begun = begun
        self._item_id = f"msg_{secrets.token_hex(12)}"
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        self._next = 0
        self._texts: list[str] = []
        self._before, _ = event_around_text("response.output_text.delta", {**self._place, "logprobs": [], "delta": TEXT})

    def opening(self, first: AnswerPart) -> bytes:
        """The events before any text."""
        item = OutputMessage(id=self._item_id, status="in_progress")
        return (
            self._event("response.created", {"response": self._begun})
            + self._event("response.in_progress", {"response": self._begun})
            + self._event("response.output_item.added", {"output_index": 0, "item": item})
            + self._event("response.content_part.added", {**self._place, "part": OutputText("")})
        )

    def texts(self, part: AnswerPart) -> bytes:
        """One event a text."""
        self._texts.extend(part.texts)
        first, self._next = self._next, self._next + len(part.texts)
        return b"".join(
            b'%b%b,"sequence_number":%d}\n\n' % (self._before, msgspec.json.encode(text), number)
            for number, text in enumerate(part.texts, first)
        )

    def ending(self, last: AnswerPart, usage: AnswerUsage) -> bytes:
        """The events after all text."""
        text = "".join(self._texts)
        whole = self._response(text, last, usage)
        return (
            self._event("response.output_text.done", {**self._place, "logprobs": [], "text": text})
            + self._event("response.content_part.done", {**self._place, "part": OutputText(text)})
            + self._event("response.output_item.done", {"output_index": 0, "item": whole.output[0]})
            + self._event(f"response.{whole.status}", {"response": whole})
        )

    def failure(self, error: ApiError) -> bytes:
        """The events of an answer that breaks off. The second has OpenAI's error object too, which its clients raise."""
        item = OutputMessage(id=self._item_id, status="incomplete", content=[OutputText("".join(self._texts))])
        failed = msgspec.structs.replace(self._begun, status="failed", error=ResponseFailure(error.message), output=[item])
        told = msgspec.json.decode(write_error(error))
        fields = {**told["error"], **told}
        return self._event("response.failed", {"response": failed}) + self._event("error", {**fields, "type": "error"})

    def whole(self, choices: list[WholeAnswer], usage: AnswerUsage) -> bytes:
        """The answer as one object."""
        return msgspec.json.encode(self._response(choices[0].text, choices[0].last, usage))

    def _response(self, text: str, last: AnswerPart, usage: AnswerUsage) -> ResponseObject:
        cut = last.finish_reason == "length"
        item = OutputMessage(id=self._item_id, status="incomplete" if cut else "completed", content=[OutputText(text)])
        total = usage.prompt_tokens + usage.completion_tokens
        return msgspec.structs.replace(
            self._begun,
            status=item.status,
            incomplete_details=IncompleteDetails() if cut else None,
            output=[item],
            usage=ResponseUsage(usage.prompt_tokens, usage.completion_tokens, total),
        )

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        number, self._next = self._next, self._next + 1
        return write_event(kind, {**fields, "sequence_number": number})


def write_error(error: ApiError) -> bytes:
    """OpenAI's object, with the names that parameters have here."""
    name = _NAMES.get(error.param or "")
    if name is None:
        return error.to_json()
    message = name + error.message.removeprefix(error.param) if error.message.startswith(error.param) else error.message
    return ApiError(error.status, message, kind=error.kind, code=error.code, param=name).to_json()
