"""`Pulse`: whether a worker's process still answers.

A frozen process keeps its connection open and says nothing; one that reads a long prompt says nothing either, but answers a
ping. So a worker that has requests and was not heard for a tick is asked, and one that does not answer for three more has
stalled. Pure policy. Invariants: a stall is seen within `TICKS` ticks of the last word, and not before `TICKS - 1`; time is
counted in ticks that the gateway itself has lived through, so its own sleep is never held against its workers. It ignores what
is said and whether an engine makes progress.
"""

from __future__ import annotations

from typing import Literal

TICKS = 5


class Pulse:
    """The pulse of one worker; `tick` is called `TICKS` times within the limit."""

    def __init__(self) -> None:
        self._was_heard = False
        # Ticks since it was asked; None where no question is open.
        self._silent: int | None = None

    def hear(self) -> None:
        """The worker has said something."""
        self._was_heard = True

    def tick(self, is_busy: bool) -> Literal["quiet", "ask", "stalled"]:
        """What to do now: nothing, send a ping, or take it for frozen (said once). `is_busy`: the worker has requests."""
        if self._was_heard:
            self._was_heard, self._silent = False, None
        elif self._silent is not None:
            self._silent += 1
            if self._silent == TICKS - 2:
                return "stalled"
        elif is_busy:
            self._silent = 0
            return "ask"
        return "quiet"
