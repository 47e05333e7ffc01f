"""Chaccu's own conversations: `{"id": …, "source": …, "system": …, "messages": [{"role": …, "content": …}, …]}`, usually
one a line.

A `source` that is already there is kept, so cleaning a cleaned file again changes nothing of its parts' kinship. Windows of a
longer answer, which a token limit makes, are not taken: by themselves they are no conversations.
"""

from __future__ import annotations

from typing import Any

from chaccu.data.outcome import Drop
from chaccu.data.readers.fields import find_turns, read_id, read_turn
from chaccu.data.records import Draft, qualified_source, source_of

COLUMNS = frozenset({"id", "source", "system", "messages"})


def recognises(value: Any) -> bool:
    """An object with a list of messages."""
    return isinstance(value, dict) and isinstance(value.get("messages"), list)


def parse(value: Any, number: int, origin: str) -> Draft | Drop:
    """The record's turns as found; a pending answer (null) is a turn without text."""
    messages = find_turns(value, "messages")
    if isinstance(messages, Drop):
        return messages
    if any(isinstance(message, dict) and (message.get("trained_from") or message.get("unfinished")) for message in messages):
        return Drop("window of a longer answer")
    system = value.get("system")
    if system is not None and not isinstance(system, str):
        return Drop("system is no text")
    record_id = read_id(value, number)
    source = value.get("source")
    if not isinstance(source, str) or not source:
        source = qualified_source(origin, source_of(record_id))
    turns = tuple(read_turn(message, ("role",), ("content",)) for message in messages)
    return Draft(id=record_id, source=source, system=system, turns=turns)
