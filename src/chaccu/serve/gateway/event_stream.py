"""Server-sent events that have a name, as Anthropic's Messages and OpenAI's Responses write them.

Invariant: an event's name is the `type` of its data. (WHATWG HTML, section 9.2.)
"""

from __future__ import annotations

from typing import Any

import msgspec

_encode = msgspec.json.encode


def write_event(kind: str, fields: dict[str, Any]) -> bytes:
    """One event."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode("ascii"), _encode({"type": kind, **fields}))


class TextEvent:
    """The event `kind` that carries text as its field `name`; all else of it is encoded once."""

    def __init__(self, kind: str, fields: dict[str, Any]) -> None:
        """`fields` has `TextEvent.TEXT` where the text goes."""
        self._before, _, self._after = write_event(kind, fields).partition(_encode(self.TEXT))

    TEXT = "\x00"

    def write(self, text: str) -> bytes:
        """The event with `text`."""
        return self._before + _encode(text) + self._after
