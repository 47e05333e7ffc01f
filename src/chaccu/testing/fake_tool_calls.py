"""The chat completions of a stand-in server that calls functions.

It calls each function that it is given, with `{"place": "La Paz"}` cut into pieces, after a few words; once there is a result
of one it says what that was. A message that has `gap_ms=N` in it makes it slow. It ignores everything else.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

ARGUMENTS = ('{"place": ', '"La ', 'Paz"}')
WORDS = ("Let ", "me ", "look. ")


async def chat_events(body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of the streamed answer to `body`, the usage last."""
    messages = body["messages"]
    gap = re.search(r"gap_ms=(\d+)", json.dumps(messages))
    pieces: list[dict[str, Any]] = []
    if messages[-1]["role"] == "tool":
        found = ", ".join(message["content"] for message in messages if message["role"] == "tool")
        pieces += [{"content": f"{word} "} for word in f"It is {found}.".split()]
        reason = "stop"
    else:
        names = [tool["function"]["name"] for tool in body["tools"]]
        choice = body.get("tool_choice")
        if isinstance(choice, dict):
            names = [choice["function"]["name"]]
        elif body.get("parallel_tool_calls") is False:
            names = names[:1]
        pieces += [{"content": word} for word in WORDS]
        for index, name in enumerate(names if choice != "none" else []):
            first = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
            pieces.append({"tool_calls": [first]})
            pieces += [{"tool_calls": [{"index": index, "function": {"arguments": part}}]} for part in ARGUMENTS]
        reason = "stop" if choice == "none" else "tool_calls"
    limit = body.get("max_tokens") or len(pieces)
    yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]}
    for piece in pieces[:limit]:
        yield {"choices": [{"index": 0, "delta": piece, "finish_reason": None}]}
        await asyncio.sleep(0 if gap is None else int(gap[1]) / 1000)
    reason = "length" if limit < len(pieces) else reason
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    made = min(limit, len(pieces)) + 1
    yield {"choices": [], "usage": {"prompt_tokens": 7 * len(messages), "completion_tokens": made, "total_tokens": 0}}
