"""Anthropic's Messages, as a dialect: `/v1/messages` for text and tools.

Invariants: content that is neither is refused, never dropped; `max_tokens` is required, as there. A last message of the
assistant is the beginning of the answer. It ignores the header `anthropic-version`: this is the one version there has been.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from chaccu.serve.gateway.dialects.dialect import Asked, Dialect
from chaccu.serve.gateway.dialects.message_writer import AnswerMessage, MessagesErrorBody, MessageWriter, write_error
from chaccu.serve.gateway.dialects.parameters import MAX_MESSAGES, Count, Share, StopTexts, Unused, chat_job
from chaccu.serve.gateway.dialects.tools import MAX_TOOLS, Function, FunctionName, Named, NamedTool, Tool, job_with_tools
from chaccu.serve.gateway.errors import bad_request
from chaccu.serve.gateway.workers.answer import Job
from chaccu.serve.link import Piece, Sampling, Tokenize

_UNUSED = Unused(
    neutral=MappingProxyType({"thinking": ({"type": "disabled"},), "speed": ("standard",)}),
    about=frozenset({"cache_control", "service_tier", "inference_geo"}),
)
# No engine here counts the tokens that tools have in a prompt.
COUNT_UNUSED = Unused(
    neutral=MappingProxyType({**_UNUSED.neutral, "tools": ([],), "tool_choice": ({"type": "auto"}, {"type": "none"})}),
    about=_UNUSED.about,
)


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a text. `cache_control` is accepted and changes nothing."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None


class SaidBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """The same where blocks of other types stand beside it."""

    text: str
    cache_control: dict[str, Any] | None = None
    citations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None


class ToolUseBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tool_use"):
    """A tool that the assistant used."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None


class ToolResultBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tool_result"):
    """What came of it; that `is_error` is said to the model."""

    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None


Block = SaidBlock | ToolUseBlock | ToolResultBlock


class TextTurn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message, of text."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[TextBlock], msgspec.Meta(min_length=1)]


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], msgspec.Meta(min_length=1)]


class MessageTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool that the model may use."""

    name: FunctionName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None


class MessageToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a tool has to be used; `name` where `type` is tool."""

    type: Literal["auto", "any", "none", "tool"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


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
    tools: Annotated[list[MessageTool], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessageToolChoice | None = None


class CountTokensBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a request for the size of a prompt."""

    model: str
    messages: Annotated[list[TextTurn], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
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
        job=_job(body, sampling),
        writer=MessageWriter(answer_id, body.model),
        streamed=bool(body.stream),
        user=(body.metadata.user_id or "") if body.metadata else "",
    )


def _job(body: MessagesBody, sampling: Sampling) -> Job:
    choice = body.tool_choice
    if choice is not None and (choice.type == "tool") != (choice.name is not None):
        message = "tool_choice has a name where its type is tool, and only there."
        raise bad_request(message, code="invalid_value", param="tool_choice")
    return job_with_tools(
        body.model,
        _turns_of(body),
        sampling,
        tools=[Tool("function", Function(tool.name, tool.description, tool.input_schema)) for tool in body.tools or ()],
        choice=None if choice is None else _read_choice(choice),
        parallel=False if choice is not None and choice.disable_parallel_tool_use else None,
    )


def _read_choice(choice: MessageToolChoice) -> Literal["none", "auto", "required"] | NamedTool:
    if choice.name is not None:
        return NamedTool("function", Named(choice.name))
    return "required" if choice.type == "any" else "none" if choice.type == "none" else "auto"


def _turns_of(body: MessagesBody | CountTokensBody) -> list[dict[str, Any]]:
    """The messages in OpenAI's form. Raises `ApiError` for a block that has no place in its message."""
    # No block at all is no system text; an empty text is one.
    turns: list[dict[str, Any]] = []
    if body.system is not None and body.system != []:
        turns.append({"role": "system", "content": _text_of(body.system)})
    used: set[str] = set()
    given: Sequence[Turn | TextTurn] = body.messages
    for index, turn in enumerate(given):
        blocks: Sequence[TextBlock | Block] = () if isinstance(turn.content, str) else turn.content
        uses = [block for block in blocks if isinstance(block, ToolUseBlock)]
        results = [block for block in blocks if isinstance(block, ToolResultBlock)]
        if results if turn.role == "assistant" else uses:
            wrong = (
                f"message {index} of the {turn.role} has a block of the other's: {'tool_result' if results else 'tool_use'}."
            )
            raise bad_request(wrong, code="invalid_value", param="messages")
        unknown = [block.tool_use_id for block in results if block.tool_use_id not in used]
        if unknown:
            wrong = f"message {index} has a tool_result for {unknown[0]!r:.80}, which no tool_use before it has as its id."
            raise bad_request(wrong, code="invalid_value", param="messages")
        used.update(block.id for block in uses)
        turns += [_result_turn(block) for block in results]
        text = _text_of(turn.content)
        if uses:
            calls = [{"id": block.id, "type": "function", "function": _called(block)} for block in uses]
            turns.append({"role": "assistant", "content": text or None, "tool_calls": calls})
        elif text or not results:
            turns.append({"role": turn.role, "content": text})
    return turns


def _called(block: ToolUseBlock) -> dict[str, str]:
    return {"name": block.name, "arguments": msgspec.json.encode(block.input).decode()}


def _result_turn(block: ToolResultBlock) -> dict[str, Any]:
    text = _text_of(block.content)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": f"Error: {text}" if block.is_error else text}


def _text_of(content: str | Sequence[TextBlock | Block]) -> str:
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content if isinstance(block, TextBlock | SaidBlock))


MESSAGES = Dialect(
    path="/v1/messages",
    summary="Anthropic's Messages, for text and tools.",
    body=MessagesBody,
    unused=_UNUSED,
    ask=_ask,
    is_chat=True,
    answer=AnswerMessage,
    error=MessagesErrorBody,
    write_error=write_error,
)
