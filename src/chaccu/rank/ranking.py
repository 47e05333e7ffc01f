"""`rank_battles`: Bradley–Terry ratings with intervals, Elo beside them, and who can be compared with whom.

Invariants: wins + losses + ties of a model are its battles; the mean rating of a tier is 1000; equal battles and seed
give equal numbers. A rating that the battles do not determine is None, never a large number. It ignores what the battles
were about.

Bradley and Terry 1952, "Rank analysis of incomplete block designs"; Elo 1978, "The rating of chessplayers", by evalica.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from chaccu.errors import UsageError
from chaccu.rank.battles import LEFT_WINS, RIGHT_WINS, TIE, Battles
from chaccu.rank.cells import Cells, count_cells
from chaccu.rank.connectivity import find_components, find_tiers
from chaccu.rank.outcome_model import OutcomeModel
from chaccu.rank.tiers import MEAN, SCALE, IntervalPlan, TierRating, rate_tier, rate_with_style

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Ties = Literal["half", "davidson", "rao_kupper", "drop"]
Intervals = Literal["bootstrap", "sandwich"]

ELO_K = 4.0
_SIGNIFICANT = 0.05


class Rating(msgspec.Struct, frozen=True, kw_only=True):
    """One model. `rating`: Bradley–Terry, a difference of 400 is odds of 10 to 1; comparable within `tier` only.

    `rating` is None for a model that is a tier of its own: it has won, or lost, every battle with the others. What else
    is about the rating is None with it: `low` and `high` of the 95 % interval (None too without intervals, and where battles
    tell no error: one question or battle alone, or ties alone), `standard_error` by the sandwich, and `best_rank` and
    `worst_rank` in the tier that intervals leave open. `component` and `tier` count from 1; within a component no tier was
    beaten by a later one, and the order of two that no chain of wins joins says nothing.
    """

    model: str
    component: int
    tier: int
    rating: float | None = None
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    best_rank: int | None = None
    worst_rank: int | None = None
    elo: float
    battles: int
    wins: int
    losses: int
    ties: int


class StyleEffect(msgspec.Struct, frozen=True, kw_only=True):
    """What one standard deviation more of a style is worth in a tier, in log-odds, with its 95 % interval.

    `effect` is None for a style that tells no more there than who answers and the styles before it: it is not taken out.
    """

    style: str
    component: int
    tier: int
    effect: float | None
    low: float | None
    high: float | None


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Two models of one tier: rating of a minus rating of b with its 95 % interval, and the p-value of no difference."""

    model_a: str
    model_b: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """Ratings by component, tier and rating, best first. `components`: the models of each, largest first.

    `battles` are decided + `ties`, `both_bad` are among the ties, and `unread` rows had no winner and are not among them.
    `questions`: how many the rated battles are on, where intervals are by question. `separability`: the share of pairs in a
    tier whose intervals do not overlap; `distinct`: the share of the tested `pairs` with a p-value under 0.05; None where there
    is nothing to share. `bootstraps`: resamples drawn, 0 where intervals are not from resamples.
    """

    battles: int
    ties: int
    both_bad: int
    unread: int
    questions: int | None
    components: list[list[str]]
    ratings: list[Rating]
    separability: float | None
    distinct: float | None
    tie_model: Ties
    intervals: Intervals
    bootstraps: int
    seed: int
    style: list[StyleEffect] = []
    pairs: list[Pair] = []


def rank_battles(
    battles: Battles,
    *,
    bootstraps: int = 1000,
    seed: int = 0,
    ties: Ties = "half",
    intervals: Intervals | None = None,
    by_question: bool = True,
    with_pairs: bool = False,
) -> Ranking:
    """Rate every model.

    `ties`: half a win for each, the model of Davidson or of Rao and Kupper, or `drop`. `intervals`: the middle 95 % of
    `bootstraps` resamples (none for 0), or 1.96 sandwich errors; by question, where battles have questions, unless
    `by_question` is off. Battles with style are rated with its effect taken out; their intervals are sandwich ones unless
    resamples are asked for, each of which is a fit of all battles. `with_pairs` tests every pair of a tier.

    Raises `UsageError` for style with a tie model, `DataError` where ratings do not settle.
    """
    import numpy as np

    if battles.style is not None and ties in ("davidson", "rao_kupper"):
        raise UsageError(f"ratings with style have no model {ties!r} of ties.", remedy="ties as half, or drop")
    if not by_question:
        battles = msgspec.structs.replace(battles, question=None)
    intervals = intervals or ("sandwich" if battles.style is not None else "bootstrap")
    bootstraps = bootstraps if intervals == "bootstrap" else 0
    all_cells = count_cells(battles)
    rated = battles if ties != "drop" else _decided(battles)
    cells = all_cells if ties != "drop" else all_cells.keep(all_cells.outcome != TIE)
    model: OutcomeModel = "half" if ties == "drop" else ties
    plan = IntervalPlan(
        bootstraps=bootstraps if intervals == "bootstrap" else None, rng=np.random.default_rng(seed), with_tests=with_pairs
    )

    def rate(tier: list[int]) -> TierRating | None:
        if len(tier) < 2:
            return None
        if rated.style is not None:
            return rate_with_style(rated, tier, plan=plan)
        return rate_tier(cells.within(tier), len(tier), model=model, plan=plan)

    rows, parts = _rate_parts(battles.models, cells, all_cells, _rate_elo(rated), rate)
    questions = None if rated.question is None else len(np.unique(rated.question))
    return _gather(battles, rows, parts, questions, ties=ties, intervals=intervals, bootstraps=bootstraps, seed=seed)


class _Part(msgspec.Struct, frozen=True):
    """A tier of a component, both counted from 1."""

    component: int
    tier: int
    models: list[str]
    rated: TierRating | None


def _rate_parts(
    names: list[str], cells: Cells, all_cells: Cells, elo: list[float], rate: Any
) -> tuple[list[Rating], list[_Part]]:
    """The rows in their order, and the tiers that they stand in."""
    components = find_components(range(len(names)), zip(cells.left.tolist(), cells.right.tolist(), strict=True))
    number = {model: place for place, component in enumerate(components) for model in component}
    beaten: list[list[tuple[int, int]]] = [[] for _ in components]
    for pair in cells.beaten_pairs():
        beaten[number[pair[0]]].append(pair)
    tally = all_cells.tally(len(names))
    rows: list[Rating] = []
    parts: list[_Part] = []
    for component_number, component in enumerate(components, start=1):
        for tier_number, tier in enumerate(find_tiers(component, beaten[component_number - 1]), start=1):
            rated = rate(tier)
            parts.append(_Part(component_number, tier_number, [names[model] for model in tier], rated))
            of_tier = []
            for place, model in enumerate(tier):
                wins, losses, ties = (int(counts[model]) for counts in tally)
                row = Rating(
                    model=names[model],
                    component=component_number,
                    tier=tier_number,
                    elo=elo[model],
                    battles=wins + losses + ties,
                    wins=wins,
                    losses=losses,
                    ties=ties,
                    **({} if rated is None else _figures(rated, place)),
                )
                of_tier.append(row)
            rows += sorted(of_tier, key=lambda row: (-(row.rating or 0.0), row.model))
    return rows, parts


def _figures(rated: TierRating, place: int) -> dict[str, Any]:
    """What a row has of its tier."""

    def at(values: Array | None) -> float | None:
        return None if values is None else _finite(float(values[place]))

    best, worst = (None if ranks is None else int(ranks[place]) for ranks in (rated.best, rated.worst))
    low, high = at(rated.low), at(rated.high)
    if low is None or high is None:
        best = worst = None
    return {
        "rating": float(rated.rating[place]),
        "standard_error": at(rated.error),
        "low": low,
        "high": high,
        "best_rank": best,
        "worst_rank": worst,
    }


def _finite(value: float) -> float | None:
    """None for what one question or one battle does not tell."""
    return value if math.isfinite(value) else None


def _gather(
    battles: Battles,
    rows: list[Rating],
    parts: list[_Part],
    questions: int | None,
    *,
    ties: Ties,
    intervals: Intervals,
    bootstraps: int,
    seed: int,
) -> Ranking:
    components: dict[int, list[str]] = {}
    for part in parts:
        components.setdefault(part.component, []).extend(part.models)
    order = {model: place for place, model in enumerate(battles.models)}
    possible = sum(part.rated.pairs for part in parts if part.rated is not None)
    separated = sum(part.rated.separated for part in parts if part.rated is not None)
    pairs = [pair for part in parts for pair in _name_pairs(part)]
    p_values = [pair.p_value for pair in pairs if pair.p_value is not None]
    return Ranking(
        battles=len(battles),
        ties=int((battles.outcome == TIE).sum()),
        both_bad=battles.both_bad,
        unread=battles.unread,
        questions=questions,
        components=[sorted(models, key=order.__getitem__) for models in components.values()],
        ratings=rows,
        separability=separated / possible if possible else None,
        distinct=sum(p_value < _SIGNIFICANT for p_value in p_values) / len(p_values) if p_values else None,
        tie_model=ties,
        intervals=intervals,
        bootstraps=bootstraps,
        seed=seed,
        style=[effect for part in parts for effect in _name_effects(part, battles.styles)],
        pairs=pairs,
    )


def _name_pairs(part: _Part) -> list[Pair]:
    return [
        Pair(
            model_a=part.models[test.first],
            model_b=part.models[test.second],
            difference=test.difference,
            low=_finite(test.low),
            high=_finite(test.high),
            p_value=_finite(test.p_value),
        )
        for test in (part.rated.tests if part.rated is not None else [])
    ]


def _name_effects(part: _Part, styles: tuple[str, ...]) -> list[StyleEffect]:
    if part.rated is None or part.rated.effects is None:
        return []
    return [
        StyleEffect(
            style=style,
            component=part.component,
            tier=part.tier,
            effect=_finite(effect),
            low=_finite(low),
            high=_finite(high),
        )
        for style, (effect, low, high) in zip(styles, part.rated.effects.tolist(), strict=True)
    ]


def _decided(battles: Battles) -> Battles:
    """The battles without ties; models keep their numbers."""
    chosen = battles.outcome != TIE
    return msgspec.structs.replace(
        battles,
        left=battles.left[chosen],
        right=battles.right[chosen],
        outcome=battles.outcome[chosen],
        question=None if battles.question is None else battles.question[chosen],
        style=None if battles.style is None else battles.style[chosen],
    )


def _rate_elo(battles: Battles) -> list[float]:
    """Elo ratings by model number, from 1000, K = 4, battles in file order."""
    import evalica
    import pandas as pd  # type: ignore[import-untyped]

    models = range(len(battles.models))
    if not len(battles):
        return [MEAN for _ in models]
    meaning = {LEFT_WINS: evalica.Winner.X, TIE: evalica.Winner.Draw, RIGHT_WINS: evalica.Winner.Y}
    result = evalica.elo(
        battles.left,
        battles.right,
        [meaning[value] for value in battles.outcome.tolist()],
        index=pd.Index(models),
        initial=MEAN,
        scale=SCALE,
        k=ELO_K,
    )
    # evalica sorts its scores; the index puts them back in order.
    return [float(score) for score in result.scores.reindex(models)]
