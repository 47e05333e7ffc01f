"""ShareGPT dumps: `{"id": …, "conversations": [{"from": …, "value": …}, …]}`, in an array or one a line.

The turns may be called `conversation` or `items`, a turn's keys `role` and `content`. Parts of one conversation share the id up
to the last `_<number>`.
"""

from __future__ import annotations

from typing import Any

from chaccu.data.outcome import Drop
from chaccu.data.readers.fields import find_turns, read_id, read_turn
from chaccu.data.records import Draft, qualified_source, source_of

_TURN_LISTS = ("conversations", "conversation", "items")
COLUMNS = frozenset({"id", *_TURN_LISTS})


def recognises(value: Any) -> bool:
    """An object with a list of turns under one of the names that ShareGPT dumps use."""
    return isinstance(value, dict) and any(isinstance(value.get(key), list) for key in _TURN_LISTS)


def parse(value: Any, number: int, origin: str) -> Draft | Drop:
    """The record's turns as found. Keys it does not know are ignored."""
    turns = find_turns(value, *_TURN_LISTS)
    if isinstance(turns, Drop):
        return turns
    record_id = read_id(value, number)
    return Draft(
        id=record_id,
        source=qualified_source(origin, source_of(record_id)),
        turns=tuple(read_turn(turn, ("from", "role"), ("value", "content")) for turn in turns),
    )
