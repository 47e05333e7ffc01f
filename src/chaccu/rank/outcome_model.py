"""How likely a win, a loss and a tie are, given the distance between two models: three models of ties.

Each is a log-likelihood that is concave in the distance d of two strengths (natural logarithms of odds) and, but for the
first, in a tie parameter η that all pairs share:

- `half`: a tie is half a win and half a loss (Bradley and Terry 1952). P(win) = σ(d).
- `davidson`: P(win) : P(tie) : P(loss) = e^(d/2) : e^η : e^(−d/2) (Davidson 1970, "On extending the Bradley–Terry model to
  accommodate ties in paired comparison experiments").
- `rao_kupper`: P(win) = σ(d − η), P(loss) = σ(−d − η), the rest is a tie; η > 0 (Rao and Kupper 1967, "Ties in
  paired-comparison experiments: a generalization of the Bradley–Terry model").

Invariant: functions work element by element and on arrays of any shape. It ignores which models a distance lies between.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

OutcomeModel = Literal["half", "davidson", "rao_kupper"]


class Slopes(msgspec.Struct, frozen=True):
    """The gradient of a log-likelihood by d and η, and its negated second derivatives; η's are None for `half`."""

    by_d: Array
    by_dd: Array
    by_eta: Array | None = None
    by_d_eta: Array | None = None
    by_eta_eta: Array | None = None


def slopes(model: OutcomeModel, won: Array, lost: Array, tied: Array, d: Array, eta: Array | None) -> Slopes:
    """Slopes where the first of a pair has won, lost and tied so often; arrays that broadcast with `d` and `eta`."""
    if model == "half" or eta is None:
        return _half(won, lost, tied, d)
    return _davidson(won, lost, tied, d, eta) if model == "davidson" else _rao_kupper(won, lost, tied, d, eta)


def first_eta(model: OutcomeModel, ties: float, battles: float) -> float | None:
    """The η of equal models that tie so often: where a search begins.

    None for a model without η, and where η has no finite value.
    """
    if model == "half" or not 0 < ties < battles:
        return None
    share = ties / battles
    if model == "davidson":
        return math.log(2 * share / (1 - share))
    return math.log((1 + share) / (1 - share))


def _sigmoid(x: Array) -> Array:
    import numpy as np

    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x))


def _half(won: Array, lost: Array, tied: Array, d: Array) -> Slopes:
    count = won + lost + tied
    p = _sigmoid(d)
    expected = count * p
    return Slopes(won + 0.5 * tied - expected, expected * (1 - p))


def _davidson(won: Array, lost: Array, tied: Array, d: Array, eta: Array) -> Slopes:
    import numpy as np

    count = won + lost + tied
    top = np.maximum(np.abs(d) / 2, eta)
    win, loss, tie = np.exp(d / 2 - top), np.exp(-d / 2 - top), np.exp(eta - top)
    total = win + loss + tie
    lead, tie, decided = (win - loss) / total, tie / total, (win + loss) / total
    return Slopes(
        (won - lost - count * lead) / 2,
        count * (decided - lead**2) / 4,
        tied - count * tie,
        -count * lead * tie / 2,
        count * tie * (1 - tie),
    )


def _rao_kupper(won: Array, lost: Array, tied: Array, d: Array, eta: Array) -> Slopes:
    """P(tie) = (e^(2η) − 1) P(win) P(loss), which makes the likelihood one of two logistic curves and a term of η alone."""
    import numpy as np

    at_least, at_most = won + tied, lost + tied
    win, loss = _sigmoid(d - eta), _sigmoid(-d - eta)
    above, below = at_least * (1 - win), at_most * (1 - loss)
    curved_above, curved_below = above * win, below * loss
    rest = -np.expm1(-2 * eta)
    return Slopes(
        above - below,
        curved_above + curved_below,
        2 * tied / rest - above - below,
        curved_below - curved_above,
        curved_above + curved_below + 4 * tied * (1 - rest) / rest**2,
    )
