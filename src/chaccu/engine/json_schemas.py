"""JSON schemas for answers to keep to, checked through llguidance, whose grammars both our engines for real models use.

Invariants: a schema that cannot be carried out to the letter is refused, with the reason, before a token is generated; between
the parts of an answer stands one blank at most, since a small model that may write blanks without end does. It ignores how an
engine applies a grammar.
"""

from __future__ import annotations

from importlib import util
from typing import Any

import msgspec

from chaccu.engine.protocol import WrongRequestError

# llguidance's own settings inside a schema (its documentation, "JSON schema").
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_REASON_CHARS = 300


def can_read_schemas() -> bool:
    """Whether llguidance is installed."""
    return util.find_spec("llguidance") is not None


def read_schema(text: str) -> dict[str, Any]:
    """The schema in `text`, with our spacing. Raises `WrongRequestError` for one that asks for what cannot be carried out."""
    from llguidance import LLMatcher

    schema = {**msgspec.json.decode(text, type=dict[str, Any]), "x-guidance": _SPACING}
    wrong = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(msgspec.json.encode(schema).decode()))
    if wrong:
        # Its later lines show the grammar that llguidance made of the schema.
        reason = wrong.strip().partition("\n")[0][:_MAX_REASON_CHARS]
        raise WrongRequestError(f"the JSON schema cannot be carried out: {reason}.", parameter="response_format")
    return schema
