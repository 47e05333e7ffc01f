"""Which worker gets a request: the least expected wait.

A pure policy over plain records: no clock, no sockets, no engine. Invariant: it never chooses a worker that drains. It
ignores prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as routing sees it. `outstanding`: requests it has; `last_given_s`: when it last got one, on any clock."""

    slots: int
    outstanding: int
    last_given_s: float
    draining: bool = False


def choose_worker(loads: Sequence[WorkerLoad]) -> int | None:
    """Index of the worker to use, or None when none takes work.

    The expected wait grows with the share of a worker's slots that would be taken; among equals the one that rested longest.
    """
    ready = [index for index, load in enumerate(loads) if not load.draining]
    if not ready:
        return None
    return min(ready, key=lambda index: ((loads[index].outstanding + 1) / loads[index].slots, loads[index].last_given_s))
