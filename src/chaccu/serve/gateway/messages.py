"""Anthropic's Messages, as a dialect: `/v1/messages` for text.

Invariants: content that is no text is refused, never dropped; `max_tokens` is required, as there. A last message of the
assistant is the beginning of the answer. It ignores the header `anthropic-version`: this is the one version there has been.
"""

from __future__ import annotations

import secrets
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from chaccu.serve.gateway.answer import AnswerPart, AnswerUsage
from chaccu.serve.gateway.choices import WholeAnswer
from chaccu.serve.gateway.dialect import Asked, Dialect
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.event_stream import TEXT, event_around_text, write_event
from chaccu.serve.gateway.parameters import MAX_MESSAGES, Count, Share, StopTexts, Unused, chat_job
from chaccu.serve.link import Piece, Sampling, Tokenize

UNUSED = Unused(
    neutral=MappingProxyType(
        {
            "tools": ([],),
            "tool_choice": ({"type": "auto"}, {"type": "none"}),
            "thinking": ({"type": "disabled"},),
            "speed": ("standard",),
        }
    ),
    about=frozenset({"cache_control", "service_tier", "inference_geo"}),
)
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
_STOP_REASONS = MappingProxyType({"stop": "end_turn", "length": "max_tokens"})


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message's text. `cache_control` is accepted and changes nothing."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None


Content = str | Annotated[list[TextBlock], msgspec.Meta(min_length=1)]


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message."""

    role: Literal["user", "assistant"]
    content: Content


class Metadata(msgspec.Struct, frozen=True):
    """`user_id`: who asks, for the conversation log."""

    user_id: str | None = None


class MessagesBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a request for a message."""

    model: str
    max_tokens: Count
    messages: Annotated[list[Turn], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[TextBlock] | None = None
    stream: bool | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: StopTexts | None = None
    metadata: Metadata | None = None


class CountTokensBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a request for the size of a prompt."""

    model: str
    messages: Annotated[list[Turn], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[TextBlock] | None = None

    def questions(self) -> list[Tokenize]:
        """The one question: the prompt of the answer, or of what follows its beginning."""
        asked = chat_job(self.model, _turns_of(self), Sampling()).request()
        return [Tokenize(request=0, model=self.model, asked=asked)]

    def write(self, pieces: list[Piece], context_tokens: int) -> CountTokensAnswer:
        """What the worker found."""
        return CountTokensAnswer(sum(len(piece.found.ids) for piece in pieces if piece.found is not None))


class CountTokensAnswer(msgspec.Struct, frozen=True):
    """Tokens of the prompt."""

    input_tokens: int


class MessageUsage(msgspec.Struct, frozen=True):
    """Tokens of the prompt and of the answer."""

    input_tokens: int
    output_tokens: int


class AnswerBlock(msgspec.Struct, frozen=True):
    """The answer's text."""

    text: str
    type: Literal["text"] = "text"


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer; one without text has no block."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock] = []
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"] | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageWriter:
    """Writes one answer as a message, whole or as its events."""

    def __init__(self, answer_id: str, model: str) -> None:
        self._id = answer_id
        self._model = model
        self._has_block = False
        delta = {"index": 0, "delta": {"type": "text_delta", "text": TEXT}}
        self._before, self._after = event_around_text("content_block_delta", delta)

    def opening(self, first: AnswerPart) -> bytes:
        """The events before any text."""
        begun = AnswerMessage(id=self._id, model=self._model, usage=MessageUsage(first.prompt_tokens, 0))
        return write_event("message_start", {"message": begun})

    def texts(self, part: AnswerPart) -> bytes:
        """One event a text; the first of all begins the answer's one block."""
        begun = b""
        if not self._has_block:
            self._has_block = True
            begun = write_event("content_block_start", {"index": 0, "content_block": AnswerBlock("")})
        return begun + b"".join(self._before + msgspec.json.encode(text) + self._after for text in part.texts)

    def ending(self, last: AnswerPart, usage: AnswerUsage) -> bytes:
        """The events after all text."""
        reason, sequence = _stop_of(last)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        ends = [write_event("content_block_stop", {"index": 0})] if self._has_block else []
        ends.append(write_event("message_delta", {"delta": delta, "usage": _usage(usage)}))
        ends.append(write_event("message_stop", {}))
        return b"".join(ends)

    def failure(self, error: ApiError) -> bytes:
        """The event of an answer that breaks off."""
        return b"event: error\ndata: %b\n\n" % write_error(error)

    def whole(self, choices: list[WholeAnswer], usage: AnswerUsage) -> bytes:
        """The answer as one object."""
        text = choices[0].text
        reason, sequence = _stop_of(choices[0].last)
        answer = AnswerMessage(
            id=self._id,
            model=self._model,
            content=[AnswerBlock(text)] if text else [],
            stop_reason=reason,
            stop_sequence=sequence,
            usage=_usage(usage),
        )
        return msgspec.json.encode(answer)


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


def _ask(body: MessagesBody, fields: dict[str, Any]) -> Asked:
    sampling = Sampling(
        max_tokens=body.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        stop=tuple(body.stop_sequences or ()),
    )
    answer_id = f"msg_{secrets.token_hex(12)}"
    return Asked(
        answer_id=answer_id,
        job=chat_job(body.model, _turns_of(body), sampling),
        writer=MessageWriter(answer_id, body.model),
        streamed=bool(body.stream),
        user=(body.metadata.user_id or "") if body.metadata else "",
    )


def _turns_of(body: MessagesBody | CountTokensBody) -> list[dict[str, Any]]:
    """The messages in OpenAI's form."""
    # No block at all is no system text; an empty text is one.
    system = [] if body.system is None or body.system == [] else [{"role": "system", "content": _text_of(body.system)}]
    return system + [{"role": turn.role, "content": _text_of(turn.content)} for turn in body.messages]


def _text_of(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _stop_of(last: AnswerPart) -> tuple[Any, str | None]:
    """The stop reason, and the stop sequence if one was it."""
    if last.stopped_by is not None:
        return "stop_sequence", last.stopped_by
    return _STOP_REASONS[last.finish_reason or "stop"], None


def _usage(usage: AnswerUsage) -> MessageUsage:
    return MessageUsage(usage.prompt_tokens, usage.completion_tokens)


MESSAGES = Dialect(
    path="/v1/messages",
    summary="Anthropic's Messages, for text.",
    body=MessagesBody,
    unused=UNUSED,
    ask=_ask,
    is_chat=True,
    answer=AnswerMessage,
    error=MessagesErrorBody,
    write_error=write_error,
)
