"""Conversations made of texts, for the tests of single steps."""

from __future__ import annotations

from typing import Any

from chaccu.conversation import Conversation, Message
from chaccu.data.outcome import Changed


def talk(*texts: str, system: str | None = None, record_id: str = "t_0") -> Conversation:
    """Questions and answers in turn."""
    roles: tuple[Any, ...] = ("user", "assistant")
    messages = tuple(Message(roles[place % 2], text) for place, text in enumerate(texts))
    return Conversation(messages=messages, system=system, id=record_id, source="dump#t")


def texts_of(outcome: Any) -> list[str | None]:
    """The texts of a conversation, or of the one that it was changed to."""
    conversation = outcome.conversations[0] if isinstance(outcome, Changed) else outcome
    return [message.content for message in conversation.messages]
