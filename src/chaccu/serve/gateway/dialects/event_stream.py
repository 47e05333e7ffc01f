"""Server-sent events that have a name, as Anthropic's Messages and OpenAI's Responses write them.

Invariant: an event's name is the `type` of its data. (WHATWG HTML, section 9.2.)
"""

from __future__ import annotations

from typing import Any

import msgspec

TEXT = "\x00"


def write_event(kind: str, fields: dict[str, Any]) -> bytes:
    """One event."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode("ascii"), msgspec.json.encode({"type": kind, **fields}))


def event_around_text(kind: str, fields: dict[str, Any]) -> tuple[bytes, bytes]:
    """What stands before and after the encoded text, which is `TEXT` in `fields`, in each event of this kind."""
    before, _, after = write_event(kind, fields).partition(msgspec.json.encode(TEXT))
    return before, after
