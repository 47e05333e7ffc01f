"""`ToolChat`: a conversation in which an assistant may call functions, as OpenAI's chat API writes it.

Chat formats here have no place for functions: such a conversation is written by the server that answers it. Invariant: messages
hold `role`, `content` (text, or null beside calls), and where they have them `tool_calls` and `tool_call_id`; nothing else. It
ignores what a function does.
"""

from __future__ import annotations

from typing import Any

import msgspec


class ToolChat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`tools` and `tool_choice` have the API's form; `parallel_tool_calls` None leaves it to the server."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def to_openai(self) -> dict[str, Any]:
        """The fields of a request for a chat completion."""
        fields: dict[str, Any] = {"messages": self.messages}
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            value = getattr(self, name)
            if value is not None and value != []:
                fields[name] = value
        return fields


class ToolCallDelta(msgspec.Struct, frozen=True, array_like=True):
    """A part of call number `index` of an answer: its first one has the `id` and the function's `name`; the `arguments` of all
    its parts are one JSON text.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
