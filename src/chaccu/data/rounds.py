"""Rounds: a user's turn with everything up to the next user's turn. Conversations are cut and thinned only between rounds.

Invariant: `join_rounds(c, split_rounds(c.messages)) == c` for every conversation that begins with the user.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from chaccu.conversation import Conversation, Message

Round = tuple[Message, ...]


def split_rounds(messages: Iterable[Message]) -> list[Round]:
    """The rounds of `messages`, in order."""
    rounds: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(message)
    return [tuple(turns) for turns in rounds]


def join_rounds(conversation: Conversation, rounds: Iterable[Round], *, id_suffix: str = "") -> Conversation:
    """`conversation` with these rounds only; `id_suffix` tells parts of one conversation apart."""
    messages = tuple(message for turns in rounds for message in turns)
    return msgspec.structs.replace(conversation, messages=messages, id=conversation.id + id_suffix)
