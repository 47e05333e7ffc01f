"""`chaccu rank`: battles to ratings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from chaccu.rank import Ranking


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("rank", epilog="Example: chaccu rank battles.csv --out ratings.json")(rank_command)


def rank_command(
    battles: Annotated[Path, typer.Argument(help="CSV or JSONL with model_a, model_b and winner (model_a | model_b | tie).")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    bootstraps: Annotated[int, typer.Option(min=0, help="Resamples for the 95 % intervals; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other resamples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ranking as one JSON object.")] = False,
) -> None:
    """Rate models by their battles: Bradley–Terry with intervals, and Elo.

    A tie is half a win for each. Models that no chain of battles joins are reported apart, and not ranked together.
    """
    import msgspec

    from chaccu.artifact import write_json
    from chaccu.rank import rank_battles, read_battles

    ranking = rank_battles(read_battles(battles), bootstraps=bootstraps, seed=seed)
    if out is not None:
        write_json(out, ranking)
    if as_json:
        typer.echo(msgspec.json.encode(ranking).decode())
    else:
        _say_ranking(ranking)


def _say_ranking(ranking: Ranking) -> None:
    width = max(len("model"), *(len(row.model) for row in ranking.ratings))
    tiers = {(row.component, row.tier) for row in ranking.ratings}
    shown: tuple[int, int] | None = None
    rank = 0
    for row in ranking.ratings:
        if (row.component, row.tier) != shown:
            if len(tiers) > 1:
                typer.echo(f"{chr(10) if shown else ''}component {row.component}, tier {row.tier}")
            typer.echo(
                f"{'':>4}  {'model':<{width}}  {'rating':>6}  {'95 %':^13}  {'Elo':>6}  {'won':>7} {'lost':>7} {'tied':>7}"
            )
            shown, rank = (row.component, row.tier), 0
        rank += 1
        rating = "–" if row.rating is None else f"{row.rating:.0f}"
        interval = "–" if row.low is None or row.high is None else f"{row.low:.0f} … {row.high:.0f}"
        typer.echo(
            f"{rank:>4}  {row.model:<{width}}  {rating:>6}  {interval:^13}  {row.elo:>6.0f}  "
            f"{row.wins:>7,} {row.losses:>7,} {row.ties:>7,}"
        )
    decided = ranking.battles - ranking.ties
    typer.echo(f"{ranking.battles:,} battles = {decided:,} decided + {ranking.ties:,} ties, {len(ranking.ratings)} models")
    if len(ranking.components) > 1:
        typer.echo(f"warning: {len(ranking.components)} components that never met; ratings compare within one only.", err=True)
    if len(tiers) > len(ranking.components):
        typer.echo(
            "warning: between some models every battle went one way, so their distance has no finite value; "
            "they stand in tiers of their own, the upper first. Ratings compare within a tier only.",
            err=True,
        )
