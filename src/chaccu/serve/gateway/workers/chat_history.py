"""`read_history`: what was said before an answer, as the log has it.

It ignores what a format or a server makes of it.
"""

from __future__ import annotations

from typing import Any


def read_history(messages: Any) -> tuple[str | None, list[dict[str, Any]]]:
    """A request's system text and its messages: text joined out of parts, null where a part is no text (an image), tool calls
    as they are."""
    system: list[str] = []
    history: list[dict[str, Any]] = []
    for message in messages if isinstance(messages, list) else []:
        fields = message if isinstance(message, dict) else {}
        role, text = fields.get("role"), _text_of(fields.get("content"))
        if role in ("system", "developer") and text is not None and not history:
            system.append(text)
            continue
        turn = {"role": role, "content": text}
        history.append({**turn, "tool_calls": fields["tool_calls"]} if fields.get("tool_calls") else turn)
    return "\n\n".join(system) if system else None, history


def _text_of(content: Any) -> str | None:
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if found and len(found) == len(texts) else None
