"""OpenAI's Responses, as a dialect: `/v1/responses` for text.

Invariants: the gateway keeps no answers, so `store` is false, and what would need a kept answer is refused; events are numbered
from 0 without a gap; a stream ends with `response.completed` or `response.incomplete`, or breaks off with `response.failed` and
an `error` event. It ignores everything that is no message.
"""

from __future__ import annotations

import secrets
import time
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from chaccu.serve.gateway.answer import AnswerPart, AnswerUsage
from chaccu.serve.gateway.choices import WholeAnswer
from chaccu.serve.gateway.dialect import Asked, Dialect
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.event_stream import TEXT, event_around_text, write_event
from chaccu.serve.gateway.parameters import MAX_MESSAGES, SOMEBODY_SPEAKS, Count, Share, Unused, chat_job, user_of
from chaccu.serve.link import Sampling

_KEEPS_NOTHING = "this gateway keeps no answers: leave it out, and send the whole conversation as input"
_UNUSED = Unused(
    neutral=MappingProxyType(
        {
            "store": (False,),
            "previous_response_id": (),
            "conversation": (),
            "background": (False,),
            "prompt": (),
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "parallel_tool_calls": (True, False),
            "max_tool_calls": (),
            "include": ([],),
            "reasoning": ({},),
            "text": ({}, {"format": {"type": "text"}}),
            "top_logprobs": (0,),
            "truncation": ("disabled",),
        }
    ),
    about=frozenset({"user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}),
    remedies=MappingProxyType(dict.fromkeys(("store", "previous_response_id", "conversation", "background"), _KEEPS_NOTHING)),
)
_MetadataKey = Annotated[str, msgspec.Meta(max_length=64)]
_MetadataValue = Annotated[str, msgspec.Meta(max_length=512)]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message's text, said to the model or by it."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class InputMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message; one out of an earlier answer's `output` too. Of such a one `id`, `status` and `phase` change nothing."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[TextPart], msgspec.Meta(min_length=1)]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_obfuscation` is accepted and adds nothing."""

    include_obfuscation: bool = False


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a request for a response."""

    model: str
    input: (
        str
        | Annotated[list[InputMessage], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES, extra_json_schema=SOMEBODY_SPEAKS)]
    )
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], msgspec.Meta(max_length=16)] | None = None


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
    text: dict[str, dict[str, str]] = msgspec.field(default_factory=lambda: {"format": {"type": "text"}})
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
    """OpenAI's object; what the other endpoints call messages is the input here."""
    if error.param != "messages":
        return error.to_json()
    return ApiError(error.status, error.message, kind=error.kind, code=error.code, param="input").to_json()


def _ask(body: ResponsesBody, fields: dict[str, Any]) -> Asked:
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    sampling = Sampling(max_tokens=body.max_output_tokens, temperature=temperature, top_p=top_p)
    begun = ResponseObject(
        id=f"resp_{secrets.token_hex(12)}",
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        parallel_tool_calls=fields.get("parallel_tool_calls") is not False,
        temperature=temperature,
        tool_choice=fields.get("tool_choice") or "auto",
        top_p=top_p,
        user=user_of(fields) or None,
    )
    return Asked(
        answer_id=begun.id,
        job=chat_job(body.model, _messages_of(body), sampling, "input"),
        writer=ResponseWriter(begun),
        streamed=bool(body.stream),
        user=begun.user or "",
    )


def _messages_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """The request as OpenAI-style messages."""
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for message in body.input:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        messages.append({"role": message.role, "content": text})
    return messages


RESPONSES = Dialect(
    path="/v1/responses",
    summary="OpenAI's Responses, for text.",
    body=ResponsesBody,
    unused=_UNUSED,
    ask=_ask,
    is_chat=True,
    answer=ResponseObject,
    write_error=write_error,
)
