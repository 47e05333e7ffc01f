"""How an answer is written as one of OpenAI's Responses, whole or as its events.

Invariants: events are numbered from 0 without a gap; a stream ends with `response.completed` or `response.incomplete`, or
breaks off with `response.failed` and an `error` event. It ignores what was asked.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

import msgspec

from chaccu.conversation import ToolCallDelta
from chaccu.serve.gateway.dialects.event_stream import TEXT, event_around_text, write_event
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.workers.answer import AnswerPart, AnswerUsage
from chaccu.serve.gateway.workers.choices import WholeAnswer

# What the other endpoints call them.
_NAMES = {"messages": "input", "response_format": "text.format"}


class OutputText(msgspec.Struct, frozen=True):
    """The answer's text."""

    text: str
    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """The answer's text as a message."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText] = []


class OutputCall(msgspec.Struct, frozen=True, kw_only=True, tag="function_call"):
    """A function that is to be called; `arguments` is a JSON text."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Literal["in_progress", "completed", "incomplete"]


OutputItem = OutputMessage | OutputCall
_EndStatus = Literal["completed", "incomplete"]


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
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[Any] = []
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class ResponseWriter:
    """Writes one answer as a response, whole or as its events; `begun` is the response before any text."""

    def __init__(self, begun: ResponseObject) -> None:
        self._begun = begun
        self._next = 0
        # The items that are complete, and the one that events are of now: with the number of its call, if it is one.
        self._items: list[OutputItem] = []
        self._item: OutputItem | None = None
        self._call: int | None = None
        self._pieces: list[str] = []
        self._before = b""

    def opening(self, first: AnswerPart) -> bytes:
        """The events before any text."""
        created = self._event("response.created", {"response": self._begun})
        return created + self._event("response.in_progress", {"response": self._begun})

    def texts(self, part: AnswerPart) -> bytes:
        """One event a text, and one a part of a call; between items those of their ends and beginnings."""
        events = b""
        if part.texts:
            events = self._enter_message() + self._text_events(part.texts)
        for delta in part.tool_calls:
            events += self._enter_call(delta)
            if delta.arguments:
                self._pieces.append(delta.arguments)
                events += self._event("response.function_call_arguments.delta", {**self._place(), "delta": delta.arguments})
        return events

    def ending(self, last: AnswerPart, usage: AnswerUsage) -> bytes:
        """The events after all text."""
        # An answer of nothing is a message without text.
        begun = self._enter_message() if self._item is None and not self._items else b""
        left = self._leave("incomplete" if last.finish_reason == "length" else "completed")
        whole = self._response(self._items, last, usage)
        return begun + left + self._event(f"response.{whole.status}", {"response": whole})

    def failure(self, error: ApiError) -> bytes:
        """The events of an answer that breaks off. The second has OpenAI's error object too, which its clients raise."""
        items = self._items if self._item is None else [*self._items, self._ended(self._item, "incomplete")]
        failed = msgspec.structs.replace(self._begun, status="failed", error=ResponseFailure(error.message), output=items)
        told = msgspec.json.decode(write_error(error))
        fields = {**told["error"], **told}
        return self._event("response.failed", {"response": failed}) + self._event("error", {**fields, "type": "error"})

    def whole(self, choices: list[WholeAnswer], usage: AnswerUsage) -> bytes:
        """The answer as one object."""
        text, last, calls = choices[0].text, choices[0].last, choices[0].tool_calls
        status: _EndStatus = "incomplete" if last.finish_reason == "length" else "completed"
        items: list[OutputItem] = []
        if text or not calls:
            items.append(OutputMessage(id=_new_id("msg"), status=status, content=[OutputText(text)]))
        items += [
            OutputCall(id=_new_id("fc"), call_id=call.id, name=call.name, arguments=call.arguments, status=status)
            for call in calls
        ]
        return msgspec.json.encode(self._response(items, last, usage))

    def _text_events(self, texts: list[str]) -> bytes:
        self._pieces.extend(texts)
        first, self._next = self._next, self._next + len(texts)
        return b"".join(
            b'%b%b,"sequence_number":%d}\n\n' % (self._before, msgspec.json.encode(text), number)
            for number, text in enumerate(texts, first)
        )

    def _enter_message(self) -> bytes:
        """The events that lead to the text; none within it."""
        if isinstance(self._item, OutputMessage):
            return b""
        events = self._leave("completed") + self._enter(OutputMessage(id=_new_id("msg"), status="in_progress"))
        place = {**self._place(), "content_index": 0}
        self._before, _ = event_around_text("response.output_text.delta", {**place, "logprobs": [], "delta": TEXT})
        return events + self._event("response.content_part.added", {**place, "part": OutputText("")})

    def _enter_call(self, delta: ToolCallDelta) -> bytes:
        """The events that lead to the call that `delta` is a part of; none within it."""
        if isinstance(self._item, OutputCall) and self._call == delta.index:
            return b""
        left = self._leave("completed")
        self._call = delta.index
        return left + self._enter(OutputCall(id=_new_id("fc"), call_id=delta.id, name=delta.name, status="in_progress"))

    def _enter(self, item: OutputItem) -> bytes:
        self._item, self._pieces = item, []
        return self._event("response.output_item.added", {"output_index": len(self._items), "item": item})

    def _leave(self, status: _EndStatus) -> bytes:
        """The events after an item; none where there is none."""
        if self._item is None:
            return b""
        item, place = self._ended(self._item, status), self._place()
        if isinstance(item, OutputMessage):
            place = {**place, "content_index": 0}
            text = item.content[0]
            events = self._event("response.output_text.done", {**place, "logprobs": [], "text": text.text})
            events += self._event("response.content_part.done", {**place, "part": text})
        else:
            done = {**place, "name": item.name, "arguments": item.arguments}
            events = self._event("response.function_call_arguments.done", done)
        events += self._event("response.output_item.done", {"output_index": len(self._items), "item": item})
        self._items.append(item)
        self._item = None
        return events

    def _ended(self, item: OutputItem, status: _EndStatus) -> OutputItem:
        """`item` with all that has come of it."""
        text = "".join(self._pieces)
        if isinstance(item, OutputMessage):
            return msgspec.structs.replace(item, status=status, content=[OutputText(text)])
        return msgspec.structs.replace(item, status=status, arguments=text)

    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item.id, "output_index": len(self._items)}

    def _response(self, items: list[OutputItem], last: AnswerPart, usage: AnswerUsage) -> ResponseObject:
        cut = last.finish_reason == "length"
        total = usage.prompt_tokens + usage.completion_tokens
        return msgspec.structs.replace(
            self._begun,
            status="incomplete" if cut else "completed",
            incomplete_details=IncompleteDetails() if cut else None,
            output=items,
            usage=ResponseUsage(usage.prompt_tokens, usage.completion_tokens, total),
        )

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        number, self._next = self._next, self._next + 1
        return write_event(kind, {**fields, "sequence_number": number})


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def write_error(error: ApiError) -> bytes:
    """OpenAI's object, with the names that parameters have here."""
    param = error.param or ""
    name = _NAMES.get(param)
    if name is None:
        return error.to_json()
    message = name + error.message.removeprefix(param) if error.message.startswith(param) else error.message
    return ApiError(error.status, message, kind=error.kind, code=error.code, param=name).to_json()
