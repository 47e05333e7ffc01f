"""`StallWatch`: how long an upstream has been silent over one request.

Invariant: a limit is counted anew after each change, and each time that it was reached. It ignores what is done then.
"""

from __future__ import annotations

import msgspec


class SilenceLimits(msgspec.Struct, frozen=True):
    """How long an upstream may be silent: `before_answer_s` before the first byte, `in_stream_s` in a stream; 0: for ever."""

    before_answer_s: float
    in_stream_s: float

    @property
    def shortest_s(self) -> float:
        """The shorter one that there is; 0 where there is none."""
        return min((limit for limit in (self.before_answer_s, self.in_stream_s) if limit), default=0.0)


class StallWatch:
    """Looks at a mark that changes with all that comes."""

    def __init__(self) -> None:
        self._mark: object = None
        self._since_s = 0.0

    def reset(self) -> None:
        """There is nothing to watch now."""
        self._mark = None

    def is_over(self, mark: object, now_s: float, limit_s: float) -> bool:
        """Whether `mark`, which is not None, has been the same for `limit_s`."""
        if mark != self._mark:
            self._mark, self._since_s = mark, now_s
            return False
        if not limit_s or now_s - self._since_s < limit_s:
            return False
        self.reset()
        return True
