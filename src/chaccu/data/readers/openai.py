"""OpenAI chat messages: `{"messages": [{"role": …, "content": …}, …]}`, as its chat and fine-tuning files have them.

A content may be a text or a list of text parts; with a part that is no text (an image, sound) the turn has no text. An
assistant's tool calls become its text: one JSON object `{"name": …, "arguments": …}` a line, after what it said. Reasoning,
names, weights and the list of tools are ignored.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec

from chaccu.data.outcome import Drop
from chaccu.data.readers.fields import find_turns, join_parts, read_id
from chaccu.data.records import Draft, Turn, qualified_source, source_of

COLUMNS = frozenset({"id", "messages"})


def recognises(value: Any) -> bool:
    """An object with a list of messages and none of the keys that Chaccu's own conversations have beside it."""
    return isinstance(value, dict) and isinstance(value.get("messages"), list) and not {"source", "system"} & value.keys()


def parse(value: Any, number: int, origin: str) -> Draft | Drop:
    """The record's messages as turns, system and tool turns among them."""
    messages = find_turns(value, "messages")
    if isinstance(messages, Drop):
        return messages
    record_id = read_id(value, number)
    return Draft(
        id=record_id,
        source=qualified_source(origin, source_of(record_id)),
        turns=tuple(_read_message(message) for message in messages),
    )


def _read_message(message: Any) -> Turn:
    if not isinstance(message, dict):
        return Turn("", None)
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    text = join_parts(content)
    if isinstance(calls, list) and calls and (text is not None or not content):
        lines = [text or None, *map(_write_call, calls)]
        text = None if None in lines[1:] else "\n".join(line for line in lines if line is not None)
    return Turn(role if isinstance(role, str) else "", text)


def _write_call(call: Any) -> str | None:
    """A tool call as one line of JSON, None for what is none; its arguments, a JSON text in this API, as the object they
    hold. Arguments that a model wrote badly stay the text it wrote."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments")
    with suppress(ValueError, RecursionError):
        arguments = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    try:
        return msgspec.json.encode({"name": function["name"], "arguments": arguments}).decode()
    except (ValueError, TypeError, RecursionError, msgspec.MsgspecError):
        return None
