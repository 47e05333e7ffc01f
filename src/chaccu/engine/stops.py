"""`StopScanner`: cuts an answer at a stop string without ever sending a part of one.

Invariant: text is released only once no stop string can begin in it; what might be the beginning of one is held back until the
next pieces decide. The released pieces joined are the answer up to the first stop string, however the text was cut into
pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Feeds on text pieces of one answer. Empty stop strings are ignored; `stopped_by` is the one that was completed."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Add a piece; returns the text that may be sent now, and whether a stop string was completed."""
        text = self._held + text
        found = min((at for at in (text.find(stop) for stop in self._stops) if at >= 0), default=-1)
        if found >= 0:
            self._held = ""
            self.stopped_by = next(stop for stop in self._stops if text.startswith(stop, found))
            return text[:found], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, once the answer has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, all of `stop` excluded."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
