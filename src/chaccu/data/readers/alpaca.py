"""Instruction sets: `{"instruction": …, "input": …, "output": …}`, one question and its answer a record.

`input` (which may be missing or blank) follows the instruction after a blank line. Dolly's names for the same, `context` and
`response`, are read too.
"""

from __future__ import annotations

from typing import Any

from chaccu.data.outcome import Drop
from chaccu.data.readers.fields import read_id, text_or_none
from chaccu.data.records import Draft, Turn, qualified_source

_INPUTS = ("input", "context")
_OUTPUTS = ("output", "response")
COLUMNS = frozenset({"id", "instruction", "system", *_INPUTS, *_OUTPUTS})


def recognises(value: Any) -> bool:
    """An object with a text `instruction` and an output."""
    return isinstance(value, dict) and isinstance(value.get("instruction"), str) and any(key in value for key in _OUTPUTS)


def parse(value: Any, number: int, origin: str) -> Draft | Drop:
    """One round. Texts that are no texts are turns without text."""
    if not isinstance(value, dict):
        return Drop("record is no object")
    if "instruction" not in value or not any(key in value for key in _OUTPUTS):
        return Drop("record has no instruction and output")
    question = text_or_none(value["instruction"])
    extra = next((value[key] for key in _INPUTS if value.get(key) is not None), "")
    if not isinstance(extra, str):
        question = None
    elif question is not None and extra.strip():
        question = f"{question}\n\n{extra}"
    answer = next((text_or_none(value[key]) for key in _OUTPUTS if key in value), None)
    record_id = read_id(value, number)
    return Draft(
        id=record_id,
        source=qualified_source(origin, record_id),
        system=text_or_none(value.get("system")) or None,
        turns=(Turn("user", question), Turn("assistant", answer)),
    )
