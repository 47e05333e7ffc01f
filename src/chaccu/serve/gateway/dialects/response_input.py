"""What a request for a response gives as its input: messages, calls of functions, and what came of them.

Invariant: an item of another type is refused, never dropped. It ignores the rest of the request.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from chaccu.conversation.message import ROLES
from chaccu.serve.gateway.dialects.parameters import MAX_MESSAGES, SOMEBODY_SPEAKS
from chaccu.serve.gateway.errors import bad_request, from_validation

_AT = re.compile(r" - at `\$(.*)`$")


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


class InputCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call out of an earlier answer's `output`; `arguments` is a JSON text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[TextPart], msgspec.Meta(min_length=1)]
    id: str | None = None
    status: str | None = None


_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_ITEM = {
    "type": "object",
    "properties": {
        "type": {"const": "message"},
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_PART}]},
        **{name: {"type": ["string", "null"]} for name in ("id", "status", "phase")},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
# Checked by `read_items`, for the type of an item may be left out.
Items = Annotated[
    list[Annotated[dict[str, Any], msgspec.Meta(extra_json_schema=_ITEM)]],
    msgspec.Meta(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="Messages; beside them the function_call items of earlier answers, and a function_call_output for each.",
        extra_json_schema=SOMEBODY_SPEAKS,
    ),
]
_KINDS: dict[str, type[InputMessage] | type[InputCall] | type[InputResult]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputResult,
}


def read_items(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as OpenAI-style messages. Raises `ApiError`."""
    messages: list[dict[str, Any]] = []
    called: set[str] = set()
    for index, fields in enumerate(items):
        item = _read_item(fields, index)
        if isinstance(item, InputMessage):
            messages.append({"role": item.role, "content": _text_of(item.content)})
        elif isinstance(item, InputCall):
            called.add(item.call_id)
            call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
            # An answer's text and its calls are one message.
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif item.call_id in called:
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text_of(item.output)})
        else:
            message = (
                f"input[{index}] is the function_call_output of {item.call_id!r:.80}, which no function_call before it has."
            )
            raise bad_request(message, code="invalid_value", param=f"input[{index}].call_id")
    if not any(message["role"] in ROLES for message in messages):
        raise bad_request("input has no messages but system texts.", code="invalid_value", param="input")
    return messages


def _read_item(fields: dict[str, Any], index: int) -> InputMessage | InputCall | InputResult:
    kind = _KINDS.get(str(fields.get("type", "message")))
    if kind is None:
        message = f"input[{index}].type = {fields['type']!r:.80}; the types are: {', '.join(_KINDS)}."
        raise bad_request(message, code="invalid_value", param=f"input[{index}].type")
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        found = _AT.search(str(error))
        where = f"{_AT.sub('', str(error))} - at `$.input[{index}]{found[1] if found else ''}`"
        known = kind.__struct_fields__
        raise from_validation(msgspec.ValidationError(where), {"input": [{}] * index + [fields]}, known) from error


def _text_of(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
