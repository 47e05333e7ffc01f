"""Which worker gets a request: the least expected wait, and the worker that has read its beginning before.

A pure policy over plain records: no clock, no sockets, no engine. Invariants: it never chooses a worker that is not open; a
full worker only where none has a free slot, one that rests after failures only where no other is open, one of lower priority
only where those above are full. Holding a beginning in its cache wins a request for a worker only while its wait stays within
twice the least, so no conversation overloads one (the idea of bounded loads: Mirrokni, Thorup and Zadimoghaddam, "Consistent
Hashing with Bounded Loads", 2018). It ignores prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as routing sees it.

    `outstanding`: requests it has; `due_tokens`: what they are expected to write yet; `speed`: tokens a second of one of its
    requests; `cached`: the share of the new request's prompt that it has read before, 0 to 1; `last_given_s`: when it last got
    a request, on any clock; `is_open`: takes requests; `is_resting`: left out after failures.
    """

    slots: int
    outstanding: int
    last_given_s: float
    due_tokens: float = 0.0
    speed: float = 1.0
    weight: float = 1.0
    priority: int = 0
    cached: float = 0.0
    is_open: bool = True
    is_resting: bool = False


def choose_worker(loads: Sequence[WorkerLoad], tokens: float = 1.0) -> int | None:
    """Index of the worker for a request of about `tokens` of answer, or None when none takes work.

    Among equal waits it is the one that rested longest.
    """
    able = [index for index, load in enumerate(loads) if load.is_open]
    if not able:
        return None
    able = [index for index in able if not loads[index].is_resting] or able
    able = [index for index in able if loads[index].outstanding < loads[index].slots] or able
    highest = max(loads[index].priority for index in able)
    waits = {index: expected_wait_s(loads[index], tokens) for index in able if loads[index].priority == highest}
    best = min(waits, key=lambda index: (waits[index], loads[index].last_given_s))
    # The more of the prompt it need not read again, the longer a wait it is worth.
    bounds = {index: waits[best] * (1 + loads[index].cached) for index in waits if loads[index].cached > 0}
    holders = [index for index, bound in bounds.items() if waits[index] <= bound]
    if not holders:
        return best
    return min(holders, key=lambda index: (-loads[index].cached, waits[index], loads[index].last_given_s))


def expected_wait_s(load: WorkerLoad, tokens: float) -> float:
    """Seconds until a worker would have written all that is due, with a new request of `tokens`: what is due over its speed.

    The speed of a whole worker is that of one request times its slots, not the tokens that it happens to write now: a worker
    with one request would look slower than a full one of its kind. Where requests at once slow one another down, the speed of
    one is measured lower. A worker of weight 2 counts as twice as fast.
    """
    return (load.due_tokens + tokens) / (load.speed * load.slots * load.weight)


def slots_beside(slots: int, *, elsewhere: int, parties: int) -> int:
    """How many of a worker's `slots` one of its `parties` may use, while the others have requests `elsewhere`: what they left,
    and an equal part of the slots in any case, one at least. Parties are gateways, and names that it serves.

    Without that part a party with a queue, which fills each slot as it is freed, would leave the others nothing. A worker may
    so have more requests than slots for a while, less than twice as many where there are slots for all parties; they wait in
    its engine.
    """
    return max(slots - elsewhere, slots // parties, 1)
