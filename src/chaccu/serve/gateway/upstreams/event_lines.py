"""The lines of an event stream: which hold data, and how they are written.

Source: WHATWG HTML, section 9.2; an event has one line of data, as OpenAI's API writes it.
"""

from __future__ import annotations

from typing import Any

import msgspec

DONE_DATA = b"[DONE]"
_FIELD = b"data:"


def data_of(line: bytes) -> bytes | None:
    """What a line says as data; None for any other line."""
    return line[len(_FIELD) :].strip() if line.startswith(_FIELD) else None


def is_json(body: bytes) -> bool:
    """Whether `body` is a whole JSON value."""
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def data_event(fields: dict[str, Any]) -> bytes:
    """An event that holds an object."""
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"
