"""`WholeLines`: an event stream that passes line by line, so that it can be broken off between two events.

Invariant: bytes leave unchanged and in order; none that ends a line waits. It ignores what the lines say.
"""

from __future__ import annotations

_MAX_HELD_BYTES = 64 * 1024


class WholeLines:
    """The bytes of one stream. A line of more than `max_held_bytes` passes in pieces."""

    def __init__(self, max_held_bytes: int = _MAX_HELD_BYTES) -> None:
        self._max_held_bytes = max_held_bytes
        self._held = b""

    def take(self, data: bytes) -> bytes:
        """What may leave once `data` has come."""
        if self._held:
            data = self._held + data
            self._held = b""
        if data.endswith(b"\n"):
            return data
        end = data.rfind(b"\n") + 1
        if len(data) - end > self._max_held_bytes:
            return data
        self._held = data[end:]
        return data[:end]

    def take_rest(self) -> bytes:
        """What is left when the stream has come to its end."""
        held, self._held = self._held, b""
        return held
