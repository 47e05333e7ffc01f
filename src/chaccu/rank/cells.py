"""`Cells`: equal battles counted together, all that ratings without covariates depend on.

Invariants: the lower-numbered model stands on the left; each (left, right, outcome) is there once; `sum(count)` is the number
of battles. With questions, `question`, `cell` and `repeats` tell where each cell's battles come from. It ignores the order of
the battles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.rank.battles import LEFT_WINS, RIGHT_WINS, TIE, Battles

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Cells(msgspec.Struct, frozen=True, kw_only=True):
    """C cells as arrays of length C; with questions, R rows of (question, cell, how many of its battles), else None.

    Questions are numbered from 0 without a gap.
    """

    left: Array
    right: Array
    outcome: Array
    count: Array
    question: Array | None = None
    cell: Array | None = None
    repeats: Array | None = None

    @property
    def independent(self) -> int:
        """How many independent observations there are: questions, where battles have some, else battles."""
        return int(self.count.sum()) if self.question is None else int(self.question.max()) + 1

    def keep(self, chosen: Array) -> Cells:
        """The cells that a mask of length C chooses."""
        import numpy as np

        part = Cells(left=self.left[chosen], right=self.right[chosen], outcome=self.outcome[chosen], count=self.count[chosen])
        if self.question is None or self.cell is None or self.repeats is None:
            return part
        rows = chosen[self.cell]
        _, question = np.unique(self.question[rows], return_inverse=True)
        renumbered = np.cumsum(chosen) - 1
        return msgspec.structs.replace(part, question=question, cell=renumbered[self.cell[rows]], repeats=self.repeats[rows])

    def within(self, models: list[int]) -> Cells:
        """The battles in which both are of `models`, which are numbered anew, in this order."""
        import numpy as np

        models_there = np.array(models)
        part = self.keep(np.isin(self.left, models_there) & np.isin(self.right, models_there))
        order = np.argsort(models_there)
        left, right = (order[np.searchsorted(models_there[order], side)] for side in (part.left, part.right))
        return msgspec.structs.replace(part, left=left, right=right)

    def beaten_pairs(self) -> list[tuple[int, int]]:
        """(winner, loser), both ways round for a tie."""
        at_least, at_most = self.outcome != RIGHT_WINS, self.outcome != LEFT_WINS
        upper = [*self.left[at_least].tolist(), *self.right[at_most].tolist()]
        lower = [*self.right[at_least].tolist(), *self.left[at_most].tolist()]
        return list(zip(upper, lower, strict=True))

    def tally(self, models: int) -> tuple[Array, Array, Array]:
        """Wins, losses and ties of models 0 to `models` − 1."""
        import numpy as np

        def add(side: Array, outcome: int) -> Array:
            chosen = self.outcome == outcome
            return np.bincount(side[chosen], weights=self.count[chosen], minlength=models).astype(np.int64)

        return (
            add(self.left, LEFT_WINS) + add(self.right, RIGHT_WINS),
            add(self.left, RIGHT_WINS) + add(self.right, LEFT_WINS),
            add(self.left, TIE) + add(self.right, TIE),
        )


def count_cells(battles: Battles) -> Cells:
    """The cells of battles, with their questions where they have some."""
    import numpy as np

    swap = battles.left > battles.right
    left = np.where(swap, battles.right, battles.left)
    right = np.where(swap, battles.left, battles.right)
    outcome = np.where(swap, RIGHT_WINS - battles.outcome, battles.outcome)
    total = len(battles.models)
    keys, cell, count = np.unique((left * total + right) * 3 + outcome, return_inverse=True, return_counts=True)
    cells = Cells(left=keys // 3 // total, right=keys // 3 % total, outcome=keys % 3, count=count)
    if battles.question is None:
        return cells
    rows, repeats = np.unique(battles.question * len(keys) + cell, return_counts=True)
    return msgspec.structs.replace(cells, question=rows // len(keys), cell=rows % len(keys), repeats=repeats)
