"""Functions that a model may call, in requests: what they hold, and the `ToolChat` that a worker gets.

Every dialect's request comes here in the form of OpenAI's chat API. Invariant: every refusal is an `ApiError` that names the
parameter. It ignores whether an engine can call functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from chaccu.conversation import ToolChat, text_of_content
from chaccu.conversation.message import ROLES
from chaccu.errors import ConversationError
from chaccu.serve.gateway.dialects.parameters import chat_job
from chaccu.serve.gateway.errors import bad_request
from chaccu.serve.gateway.workers.answer import Job
from chaccu.serve.link import Sampling

MAX_TOOLS = 128
FunctionName = Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function by its name."""

    name: FunctionName


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The function that has to be called."""

    type: Literal["function"]
    function: Named


class CalledFunction(msgspec.Struct, frozen=True):
    """What was called; `arguments` is a JSON text."""

    name: str
    arguments: str


class GivenCall(msgspec.Struct, frozen=True):
    """A call in a message of the assistant."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


Tools = Annotated[list[Tool], msgspec.Meta(max_length=MAX_TOOLS)]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool, msgspec.Meta(description="Only beside tools, one of which it may name.")
]


def job_with_tools(
    model: str,
    messages: list[dict[str, Any]],
    sampling: Sampling,
    *,
    tools: Sequence[Tool] | None,
    choice: Literal["none", "auto", "required"] | NamedTool | None,
    parallel: bool | None,
    param: str = "messages",
    n: int = 1,
) -> Job:
    """The job of OpenAI-style `messages`, with functions that may be called or without. Raises `ApiError` as both do."""
    chat = tool_chat(messages, tools, choice, parallel, param=param)
    if chat is None:
        return chat_job(model, messages, sampling, param, n)
    return Job(model=model, chat=chat, sampling=sampling, n=n)


def tool_chat(
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Tool] | None,
    choice: Literal["none", "auto", "required"] | NamedTool | None,
    parallel: bool | None,
    *,
    param: str = "messages",
) -> ToolChat | None:
    """The chat with functions that is asked for, None where there are none. Raises `ApiError`; `param` gave the messages."""
    if not tools and not any(message.get("tool_calls") for message in messages):
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice asks for a call, and there are no tools.", code="invalid_value", param="tool_choice")
        return None
    names = [tool.function.name for tool in tools or ()]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        message = f"tool_choice names {choice.function.name!r}; the tools are: {', '.join(names) or 'none'}."
        raise bad_request(message, code="invalid_value", param="tool_choice")
    if messages[-1].get("role") == "assistant":
        message = "an answer with tools does not go on with a message of the assistant; let a user's or a tool's be the last."
        raise bad_request(message, code="unsupported_parameter", param=param)
    return ToolChat(
        messages=[_read_message(message, index, param) for index, message in enumerate(messages)],
        tools=msgspec.to_builtins(list(tools or ())),
        tool_choice=msgspec.to_builtins(choice),
        parallel_tool_calls=parallel,
    )


def _read_message(message: dict[str, Any], index: int, param: str) -> dict[str, Any]:
    """`message` with what is known of it, checked."""
    role, calls = message.get("role"), message.get("tool_calls")
    if role not in (*ROLES, "system", "developer"):
        raise bad_request(f"message {index} has the role {role!r:.80}.", code="invalid_value", param=param)
    # Not every server knows the newer name.
    read: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": None}
    if calls and role == "assistant":
        try:
            read["tool_calls"] = msgspec.to_builtins(msgspec.convert(calls, list[GivenCall]))
        except msgspec.ValidationError as error:
            what = f"the tool_calls of message {index} are none: {str(error).replace('`', '')}."
            raise bad_request(what, code="invalid_value", param=param) from error
    if message.get("content") is not None or "tool_calls" not in read:
        try:
            read["content"] = text_of_content(message.get("content"), index)
        except ConversationError as error:
            raise bad_request(f"{error.message} {error.remedy}", code="invalid_value", param=param) from error
    if role == "tool":
        answered = message.get("tool_call_id")
        if not isinstance(answered, str):
            raise bad_request(f"message {index} of a tool has no tool_call_id.", code="invalid_value", param=param)
        read["tool_call_id"] = answered
    return read
