"""`response_format`: the form that a client wants an answer to have, as OpenAI's API has it.

It ignores whether a schema can be carried out: the engine knows.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

_ANY_OBJECT = {"type": "object"}


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """Any text."""


class ObjectFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_object"):
    """Any JSON object."""


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A schema; its name and description change nothing, and `strict` is what it always is here."""

    schema: dict[str, Any]
    name: Annotated[str, msgspec.Meta(max_length=64)] = ""
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_schema"):
    """JSON that keeps to a schema."""

    json_schema: Schema


ResponseFormat = TextFormat | ObjectFormat | SchemaFormat


def schema_text(wanted: ResponseFormat | Schema | None) -> str | None:
    """The JSON text of the schema that an answer has to keep to, None for any text."""
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    if isinstance(wanted, ObjectFormat):
        schema = _ANY_OBJECT
    else:
        schema = wanted.schema if isinstance(wanted, Schema) else wanted.json_schema.schema
    return msgspec.json.encode(schema).decode()
