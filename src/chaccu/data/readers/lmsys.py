"""LMSYS-Chat-1M and WildChat: `{"conversation_id" | "conversation_hash": …, "conversation": [{"role": …, "content": …}, …]}`,
in parquet or JSON lines.

Their labels (model, language, toxicity, redaction) are ignored: the steps judge for themselves.
"""

from __future__ import annotations

from typing import Any

from chaccu.data.outcome import Drop
from chaccu.data.readers.fields import find_turns, read_id, read_turn
from chaccu.data.records import Draft, qualified_source

_IDS = ("conversation_id", "conversation_hash")
COLUMNS = frozenset({"conversation", *_IDS})


def recognises(value: Any) -> bool:
    """An object with a `conversation` and the id that these sets give it."""
    return isinstance(value, dict) and isinstance(value.get("conversation"), list) and any(key in value for key in _IDS)


def parse(value: Any, number: int, origin: str) -> Draft | Drop:
    """The record's turns as found."""
    turns = find_turns(value, "conversation")
    if isinstance(turns, Drop):
        return turns
    record_id = read_id(value, number, next((key for key in _IDS if value.get(key)), "id"))
    return Draft(
        id=record_id,
        source=qualified_source(origin, record_id),
        turns=tuple(read_turn(turn, ("role",), ("content",)) for turn in turns),
    )
