"""A transcript as the messages of Gradio's chat box.

Invariants: each turn becomes the person's message, the answer if there is any, and one foot that says who answers and how it
went; `turn_at` finds the turn of a message. Texts go in as they are, with no change to their white space.
"""

from __future__ import annotations

from typing import Any

from chaccu.web.transcript import Transcript, Turn


def render_messages(turns: Transcript) -> list[dict[str, Any]]:
    """Messages for the chat box, in order."""
    return [message for turn in turns for message in _render_turn(turn)]


def turn_at(turns: Transcript, index: int) -> int:
    """The number of the turn that message `index` belongs to; the last one when it is beyond the end."""
    end = 0
    for number, turn in enumerate(turns):
        end += len(_render_turn(turn))
        if index < end:
            return number
    return len(turns) - 1


def _render_turn(turn: Turn) -> list[dict[str, Any]]:
    messages = [_message("user", turn.prompt)]
    if turn.answer:
        messages.append(_message("assistant", turn.answer))
    title, text, status = _foot(turn)
    messages.append({**_message("assistant", text), "metadata": {"title": title, **({"status": status} if status else {})}})
    return messages


def _message(role: str, text: str) -> dict[str, Any]:
    # A bare string would lose its indentation in the chat box.
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _foot(turn: Turn) -> tuple[str, str, str]:
    """Title, text and status ("pending" turns a wheel, "" is open) of the line under an answer."""
    model = _plain(turn.model)
    match turn.state:
        case "waiting":
            return f"{model} is reading", "", "pending"
        case "writing":
            return f"{model} is writing", "", "pending"
        case "stopped":
            return f"{model} · stopped", "", "done"
        case "failed":
            remedy = f"\n\n{turn.remedy[:1].upper()}{turn.remedy[1:]}." if turn.remedy else ""
            return f"{model} · {turn.cause}", f"{_plain(turn.error)}{_plain(remedy)}", ""
    facts = [model]
    if turn.tokens:
        facts.append(f"{turn.tokens} tokens")
    if turn.total_s is not None:
        facts.append(f"{turn.total_s:.1f} s")
    if turn.finish_reason == "length":
        facts.append("cut at the token limit")
    elif not turn.answer:
        facts.append("an empty answer")
    return " · ".join(facts), "", "done"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: names and errors must not turn into markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>&#~|$" else letter for letter in text)
