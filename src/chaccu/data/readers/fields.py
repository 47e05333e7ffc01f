"""Values out of decoded records of any shape: ids, texts, content that is a list of parts.

Invariant: none of these raises, whatever the value; what is no text is None.
"""

from __future__ import annotations

from typing import Any

from chaccu.data.outcome import Drop
from chaccu.data.records import Turn

# Python writes no integer of many thousand digits.
_MAX_ID_BITS = 128


def read_id(value: dict[str, Any], number: int, key: str = "id") -> str:
    """The record's own id when it is a text or a number, else one made of its number in the file."""
    found = value.get(key)
    if isinstance(found, str) and found:
        return found
    if isinstance(found, int) and not isinstance(found, bool) and found.bit_length() <= _MAX_ID_BITS:
        return str(found)
    return f"record-{number}"


def find_turns(value: Any, *keys: str) -> list[Any] | Drop:
    """The record's list of turns, under the first of these keys that has a list; or what is wrong with the record."""
    if not isinstance(value, dict):
        return Drop("record is no object")
    turns = next((value[key] for key in keys if isinstance(value.get(key), list)), None)
    return Drop("record has no list of turns") if turns is None else turns


def text_or_none(value: Any) -> str | None:
    """`value` if it is a text."""
    return value if isinstance(value, str) else None


def join_parts(content: Any) -> str | None:
    """A content given as a text, or as a list of parts that are all texts or objects with a `text`; None for any other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if len(found) == len(texts) else None


def read_turn(turn: Any, role_keys: tuple[str, ...], text_keys: tuple[str, ...]) -> Turn:
    """A turn from an object that has its role and its text under the first of these keys that is there."""
    if not isinstance(turn, dict):
        return Turn("", None)
    role = next((turn[key] for key in role_keys if key in turn), None)
    text = next((turn[key] for key in text_keys if key in turn), None)
    return Turn(role if isinstance(role, str) else "", text_or_none(text))
