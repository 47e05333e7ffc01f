"""ShareGPT dumps: `{"id": …, "conversations": [{"from": …, "value": …}, …]}`, in an array or one a line.

The turns may be called `conversation` or `items`, a turn's keys `role` and `content`. Parts of one conversation share the id up
to the last `_<number>`.
"""

from __future__ import annotations

from typing import Any

from chaccu.data.outcome import Drop
from chaccu.data.records import Draft, Turn, qualified_source, source_of

_TURN_LISTS = ("conversations", "conversation", "items")


def recognises(value: Any) -> bool:
    """An object with a list of turns under one of the names that ShareGPT dumps use."""
    return isinstance(value, dict) and any(isinstance(value.get(key), list) for key in _TURN_LISTS)


def parse(value: Any, number: int, origin: str) -> Draft | Drop:
    """The record's turns as found. Keys it does not know are ignored."""
    if not isinstance(value, dict):
        return Drop("record is no object")
    turns = next((value[key] for key in _TURN_LISTS if isinstance(value.get(key), list)), None)
    if turns is None:
        return Drop("record has no list of turns")
    record_id = read_id(value, number)
    return Draft(
        id=record_id, source=qualified_source(origin, source_of(record_id)), turns=tuple(_parse_turn(turn) for turn in turns)
    )


def read_id(value: dict[str, Any], number: int) -> str:
    """The record's own id when it is a text or a number, else one made of its number in the file."""
    found = value.get("id")
    if isinstance(found, bool) or not isinstance(found, (str, int)) or found == "":
        return f"record-{number}"
    return str(found)


def _parse_turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        return Turn("", None)
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    return Turn(role if isinstance(role, str) else "", text if isinstance(text, str) else None)
