"""`rank_battles`: Bradley–Terry ratings with bootstrap intervals, Elo beside them, and who can be compared with whom.

Invariants: wins + losses + ties of a model are its battles; the mean rating of a tier is 1000; equal battles and seed
give equal numbers. A rating that the battles do not determine is None, never a large number. It ignores what the battles
were about.

Bradley and Terry 1952, "Rank analysis of incomplete block designs"; Elo 1978, "The rating of chessplayers". The solvers are
evalica's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.rank.battles import LEFT_WINS, RIGHT_WINS, TIE, Battles
from chaccu.rank.connectivity import find_components, find_tiers

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MEAN, SCALE = 1000.0, 400.0
ELO_K = 4.0
_TOLERANCE, _LIMIT = 1e-12, 10_000
_RESAMPLE_TOLERANCE, _RESAMPLE_LIMIT = 1e-6, 500
# A battle cell that a resample has missed keeps this much of a battle, so that the resample's ratings stay finite.
_FLOOR = 1e-3


class Rating(msgspec.Struct, frozen=True, kw_only=True):
    """One model. `rating`: Bradley–Terry, a difference of 400 is odds of 10 to 1; comparable within `tier` only.

    `rating` is None for a model that is a tier of its own: it has won, or lost, every battle with the others. `low` and
    `high` are None with it, and without resamples. `component` and `tier` count from 1; within a component tier 1 is on
    top.
    """

    model: str
    component: int
    tier: int
    rating: float | None
    low: float | None
    high: float | None
    elo: float
    battles: int
    wins: int
    losses: int
    ties: int


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """Ratings by component, tier and rating, best first. `components`: the models of each, largest first."""

    battles: int
    ties: int
    components: list[list[str]]
    ratings: list[Rating]
    bootstraps: int
    seed: int


class _Rated(msgspec.Struct, frozen=True):
    rating: float | None = None
    low: float | None = None
    high: float | None = None


class _Cells(msgspec.Struct, frozen=True):
    """Equal battles counted together: left, right, outcome and how many."""

    left: Array
    right: Array
    outcome: Array
    count: Array

    def within(self, models: list[int]) -> _Cells:
        import numpy as np

        keep = np.isin(self.left, models) & np.isin(self.right, models)
        return _Cells(self.left[keep], self.right[keep], self.outcome[keep], self.count[keep])


def rank_battles(battles: Battles, *, bootstraps: int = 1000, seed: int = 0) -> Ranking:
    """Rate every model. A tie is half a win for each; intervals are the middle 95 % of `bootstraps` resamples of battles."""
    import numpy as np

    cells = _count_cells(battles)
    elo = _rate_elo(battles)
    rng = np.random.default_rng(seed)
    names = battles.models
    components = find_components(range(len(names)), zip(cells.left.tolist(), cells.right.tolist(), strict=True))
    beaten = _beaten_pairs(cells)
    rows: list[Rating] = []
    for component_number, component in enumerate(components, start=1):
        members = set(component)
        tiers = find_tiers(component, [pair for pair in beaten if pair[0] in members])
        for tier_number, tier in enumerate(tiers, start=1):
            rated = _rate_tier(tier, cells, bootstraps, rng)
            tier_rows = [
                _row(names[model], component_number, tier_number, rated.get(model, _Rated()), elo[model], _tally(cells, model))
                for model in tier
            ]
            rows += sorted(tier_rows, key=lambda row: (-(row.rating or 0.0), row.model))
    return Ranking(
        battles=len(battles),
        ties=int((battles.outcome == TIE).sum()),
        components=[[names[model] for model in component] for component in components],
        ratings=rows,
        bootstraps=bootstraps,
        seed=seed,
    )


def _row(model: str, component: int, tier: int, rated: _Rated, elo: float, tally: tuple[int, int, int]) -> Rating:
    wins, losses, ties = tally
    return Rating(
        model=model,
        component=component,
        tier=tier,
        rating=rated.rating,
        low=rated.low,
        high=rated.high,
        elo=elo,
        battles=wins + losses + ties,
        wins=wins,
        losses=losses,
        ties=ties,
    )


def _count_cells(battles: Battles) -> _Cells:
    import numpy as np

    swap = battles.left > battles.right
    left = np.where(swap, battles.right, battles.left)
    right = np.where(swap, battles.left, battles.right)
    outcome = np.where(swap, RIGHT_WINS - battles.outcome, battles.outcome)
    total = len(battles.models)
    keys, count = np.unique((left * total + right) * 3 + outcome, return_counts=True)
    return _Cells(keys // 3 // total, keys // 3 % total, keys % 3, count)


def _beaten_pairs(cells: _Cells) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for left, right, outcome in zip(cells.left.tolist(), cells.right.tolist(), cells.outcome.tolist(), strict=True):
        if outcome != RIGHT_WINS:
            pairs.append((left, right))
        if outcome != LEFT_WINS:
            pairs.append((right, left))
    return pairs


def _tally(cells: _Cells, model: int) -> tuple[int, int, int]:
    """Wins, losses and ties of one model."""
    on_left, on_right = cells.left == model, cells.right == model
    won = on_left & (cells.outcome == LEFT_WINS) | on_right & (cells.outcome == RIGHT_WINS)
    drawn = (on_left | on_right) & (cells.outcome == TIE)
    lost = (on_left | on_right) & ~won & ~drawn
    return int(cells.count[won].sum()), int(cells.count[lost].sum()), int(cells.count[drawn].sum())


def _rate_tier(tier: list[int], cells: _Cells, bootstraps: int, rng: np.random.Generator) -> dict[int, _Rated]:
    """Rating and interval by model; empty for a tier of one."""
    import numpy as np

    if len(tier) < 2:
        return {}
    inner = cells.within(tier)
    total = int(inner.count.sum())
    point = _solve(tier, inner, inner.count.astype(float), _TOLERANCE, _LIMIT)
    resampled = np.empty((bootstraps, len(tier)))
    for index in range(bootstraps):
        drawn = rng.multinomial(total, inner.count / total)
        resampled[index] = _solve(tier, inner, np.maximum(drawn, _FLOOR), _RESAMPLE_TOLERANCE, _RESAMPLE_LIMIT)
    if not bootstraps:
        return {model: _Rated(float(point[i])) for i, model in enumerate(tier)}
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return {model: _Rated(float(point[i]), float(low[i]), float(high[i])) for i, model in enumerate(tier)}


def _solve(tier: list[int], cells: _Cells, weights: Array, tolerance: float, limit: int) -> Array:
    """Ratings in the order of `tier`, their mean 1000."""
    import evalica
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped]

    result = evalica.bradley_terry(
        cells.left,
        cells.right,
        _winners(cells.outcome),
        index=pd.Index(tier),
        weights=weights,
        tolerance=tolerance,
        limit=limit,
    )
    # evalica sorts its scores; the index puts them back in order.
    ratings = SCALE * np.log10(result.scores.reindex(tier).to_numpy())
    return np.asarray(ratings - ratings.mean() + MEAN)


def _rate_elo(battles: Battles) -> list[float]:
    """Elo ratings by model number, from 1000, K = 4, battles in file order."""
    import evalica
    import pandas as pd

    models = range(len(battles.models))
    result = evalica.elo(
        battles.left,
        battles.right,
        _winners(battles.outcome),
        index=pd.Index(models),
        initial=MEAN,
        scale=SCALE,
        k=ELO_K,
    )
    return [float(score) for score in result.scores.reindex(models)]


def _winners(outcome: Array) -> list[Any]:
    import evalica

    meaning = {LEFT_WINS: evalica.Winner.X, TIE: evalica.Winner.Draw, RIGHT_WINS: evalica.Winner.Y}
    return [meaning[value] for value in outcome.tolist()]
