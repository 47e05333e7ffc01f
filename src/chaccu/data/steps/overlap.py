"""Overlap: a dump's parts of one conversation, of which each begins by repeating the end of the one before, become one
conversation again, or lose the repetition.

The number behind a part's id (`QWJhYvA_12`) is the place of its first turn in the whole conversation. A part follows the one
before when its number says so and the turns that both claim to hold are equal; failing that, when turns at the end of the
one before are the very ones that it begins with. A part that adds nothing is dropped. Whatever does not follow (turns are
missing between, or differ) begins anew. Drafts without turns between parts are passed over.

Only parts that stand one after another in the dump are compared, so this streams. Parts that stand apart stay apart: their
first answer, whose question they lack, is then left out by `roles`, so that no answer is learned twice there either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

import msgspec

from chaccu.data.outcome import Drop, Joined, Step, Trimmed
from chaccu.data.records import Draft

_NUMBER = re.compile(r"_(\d{1,9})\Z")
_JOINED = "joined to the part before it"
_TRIMMED = "repeats the end of the part before it"
_REPEATED = "holds nothing but turns of earlier parts"

Place = tuple[int, int]


class Overlap(Step, frozen=True):
    """`parts`: `merge` makes one conversation of parts that follow one another; `cut` keeps them apart and cuts what they
    repeat."""

    name: ClassVar[str] = "overlap"

    parts: Literal["merge", "cut"] = "merge"

    def join_parts(self, drafts: Sequence[Draft]) -> list[Draft | Trimmed | Joined | Drop]:
        """What becomes of each draft; drafts without turns are passed over."""
        outcomes: list[Draft | Trimmed | Joined | Drop | _Run] = list(drafts)
        run: _Run | None = None
        for index, draft in enumerate(drafts):
            if not draft.turns:
                continue
            number = _number_of(draft)
            repeated = run.find_repeated(draft, number) if run is not None and number is not None else None
            if run is None or repeated is None:
                run = None if number is None else _Run(index, draft, number)
                continue
            added = draft.turns[repeated:]
            run.turns.extend(added)
            if not added:
                outcomes[index] = Drop(_REPEATED)
            elif self.parts == "merge":
                outcomes[index] = Joined(_JOINED, sum(len(turn.text or "") for turn in added), run.index)
                outcomes[run.index] = run
            elif repeated:
                outcomes[index] = Trimmed(msgspec.structs.replace(draft, turns=added), _TRIMMED)
        return [outcome.build() if isinstance(outcome, _Run) else outcome for outcome in outcomes]


def _number_of(draft: Draft) -> int | None:
    found = _NUMBER.search(draft.id)
    return int(found[1]) if found else None


class _Run:
    """The parts that follow one another so far: all their turns, the number of the first, where its outcome stands."""

    def __init__(self, index: int, draft: Draft, number: int) -> None:
        self.index = index
        self.turns = list(draft.turns)
        self._first = draft
        self._begin = number
        self._latest = number

    def build(self) -> Draft:
        return msgspec.structs.replace(self._first, turns=tuple(self.turns))

    def find_repeated(self, draft: Draft, number: int) -> int | None:
        """How many of `draft`'s first turns are here already, or None when it does not follow."""
        if draft.source != self._first.source or draft.system not in (None, self._first.system) or number < self._latest:
            return None
        self._latest = number
        shared = self._begin + len(self.turns) - number
        if shared >= 0:
            here = self.turns[number - self._begin :][: len(draft.turns)]
            if here == list(draft.turns[: len(here)]):
                return len(here)
        starts = (at for at in range(len(self.turns)) if self.turns[at] == draft.turns[0])
        return next((len(tail) for at in starts if (tail := self.turns[at:]) == list(draft.turns[: len(tail)])), None)
