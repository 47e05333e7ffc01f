"""Calls of functions in answers: their parts, joined.

It ignores how a dialect writes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from chaccu.conversation import ToolCallDelta
from chaccu.serve.gateway.errors import ApiError


class ToolCall(msgspec.Struct):
    """One call; `arguments` is a JSON text, if the model has written one."""

    id: str
    name: str
    arguments: str = ""

    def to_openai(self) -> dict[str, Any]:
        """As a chat completion's message has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def read_arguments(self) -> dict[str, Any]:
        """The arguments by name. Raises `ApiError` where the model has written something else."""
        try:
            return msgspec.json.decode(self.arguments or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            message = f"the model called {self.name!r} with arguments that are no JSON object: {self.arguments!r:.200}."
            raise ApiError(500, message, kind="server_error", code="engine_failed") from error


def join_calls(deltas: Iterable[ToolCallDelta]) -> list[ToolCall]:
    """The calls that `deltas` are parts of, in their order."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        call = calls.setdefault(delta.index, ToolCall("", ""))
        call.id = call.id or delta.id
        call.name = call.name or delta.name
        call.arguments += delta.arguments
    return [calls[index] for index in sorted(calls)]
