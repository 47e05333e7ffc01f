"""`chaccu rank`: battles to ratings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

if TYPE_CHECKING:
    import polars as pl

    from chaccu.rank import Ranking


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("rank", epilog="Example: chaccu rank battles.csv --out ratings.json --out board.html")(rank_command)


def rank_command(
    battles: Annotated[
        list[Path],
        typer.Argument(
            help="CSV, JSON, JSONL or Parquet with model_a, model_b and winner (model_a | model_b | tie), .gz or not; "
            "or a folder with a judge's verdicts."
        ),
    ],
    out: Annotated[
        list[Path] | None, typer.Option(help="File to write: .json, .csv, .md or .html; repeat it for more.")
    ] = None,
    bootstraps: Annotated[int, typer.Option(min=0, help="Resamples for the 95 % intervals; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other resamples.")] = 0,
    ties: Annotated[
        Literal["half", "davidson", "rao-kupper", "drop"],
        typer.Option(help="Half a win for each, a model of ties, or left out."),
    ] = "half",
    intervals: Annotated[
        Literal["bootstrap", "sandwich"] | None,
        typer.Option(help="How the 95 % intervals are found: bootstrap, unless --style, which takes sandwich."),
    ] = None,
    question_column: Annotated[
        str | None, typer.Option(help="Column whose battles belong together: questions are resampled whole. [question_id]")
    ] = None,
    by_battle: Annotated[
        bool, typer.Option("--by-battle", help="Resample single battles even where there are questions.")
    ] = False,
    style: Annotated[
        bool,
        typer.Option("--style", help="Take out the effect of length, headers, lists and bold (texts or counts in the rows)."),
    ] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="Test every pair of models; the JSON lists them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ranking as one JSON object.")] = False,
) -> None:
    """Rate models by their battles: Bradley–Terry with intervals, and Elo.

    A tie is half a win for each. Models that no chain of battles joins are reported apart, and not ranked together.
    """
    # Many small systems of equations are solved: threads would only wait for one another, minutes long on busy cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import msgspec

    from chaccu.artifact import refuse_to_replace
    from chaccu.rank import battles_of_frames, rank_battles, write_leaderboard
    from chaccu.rank.leaderboard import check_form
    from chaccu.rank.ranking import Ties

    for path in out or ():
        check_form(path)
    refuse_to_replace(battles, out or ())
    frames = _read_frames(battles)
    if question_column is None and not by_battle:
        _warn_of_questions(frames)
    ranking = rank_battles(
        battles_of_frames(frames, question_column=question_column, with_style=style),
        bootstraps=bootstraps,
        seed=seed,
        ties=cast(Ties, ties.replace("-", "_")),
        intervals=intervals,
        by_question=not by_battle,
        with_pairs=pairs,
    )
    for path in out or ():
        write_leaderboard(path, ranking)
    if as_json:
        typer.echo(msgspec.json.encode(ranking).decode())
    else:
        _say_ranking(ranking)


def _read_frames(paths: list[Path]) -> list[tuple[pl.DataFrame, str]]:
    """A table of each file, and one of all judging folders, with their names. Raises `UsageError` for a path named twice."""
    from chaccu.errors import UsageError
    from chaccu.rank import read_frame

    real = [path.resolve() for path in paths]
    if twice := next((path for place, path in enumerate(paths) if real[place] in real[:place]), None):
        raise UsageError(f"{twice} is named twice.", remedy="name it once, or its battles would count twice")
    folders = [path for path in paths if path.is_dir()]
    frames = [(read_frame(path), str(path)) for path in paths if path not in folders]
    return [*frames, (_read_folders(folders), ", ".join(map(str, folders)))] if folders else frames


def _read_folders(folders: list[Path]) -> pl.DataFrame:
    """The comparisons of judging folders, without a winner those that a report of them does not count."""
    import polars as pl

    from chaccu.judge.judged_folder import read_judged
    from chaccu.judge.tallies import compare_all

    judged = read_judged(folders)
    if judged.lost:
        typer.echo(f"warning: {judged.lost:,} verdicts that a manifest speaks of are not in the files.", err=True)
    if again := judged.repeated - judged.replaced:
        typer.echo(f"warning: {again:,} verdicts are there twice, and count once.", err=True)
    if judged.replaced:
        typer.echo(
            f"warning: {judged.replaced:,} verdicts have the ids of earlier ones, were asked otherwise and replace them; "
            "rank folders of other questions each for itself.",
            err=True,
        )
    compared = compare_all(judged.verdicts, judged.failures)
    rows = [
        (
            entry.one.model_a,
            entry.one.model_b,
            entry.one.winner if entry.fate == "counted" else None,
            str(entry.one.question_id),
        )
        for entry in compared
    ]
    return pl.DataFrame(rows, schema=dict.fromkeys(("model_a", "model_b", "winner", "question_id"), pl.String), orient="row")


def _warn_of_questions(frames: list[tuple[pl.DataFrame, str]]) -> None:
    from chaccu.rank.battles import QUESTION_COLUMN

    without = [source for frame, source in frames if QUESTION_COLUMN not in frame.columns]
    if 0 < len(without) < len(frames):
        typer.echo(
            f"warning: {', '.join(without)} without {QUESTION_COLUMN}: battles are taken as independent, in all files.",
            err=True,
        )


def _say_ranking(ranking: Ranking) -> None:
    from chaccu.rank.leaderboard import describe, show_interval, show_model, show_ranks, show_rating

    width = max(len("model"), *(len(show_model(row)) for row in ranking.ratings))
    tiers = {(row.component, row.tier) for row in ranking.ratings}
    shown: tuple[int, int] | None = None
    place = 0
    for row in ranking.ratings:
        if (row.component, row.tier) != shown:
            if len(tiers) > 1:
                typer.echo(f"{chr(10) if shown else ''}component {row.component}, tier {row.tier}")
            typer.echo(
                f"{'':>4}  {'model':<{width}}  {'rating':>6}  {'95 %':^13}  {'ranks':^7}  {'Elo':>6}  "
                f"{'won':>7} {'lost':>7} {'tied':>7}"
            )
            shown, place = (row.component, row.tier), 0
        place += 1
        typer.echo(
            f"{place:>4}  {show_model(row):<{width}}  {show_rating(row):>6}  {show_interval(row):^13}  {show_ranks(row):^7}  "
            f"{row.elo:>6.0f}  {row.wins:>7,} {row.losses:>7,} {row.ties:>7,}"
        )
    facts, warnings = describe(ranking)
    for line in facts:
        typer.echo(line)
    for line in warnings:
        typer.echo(f"warning: {line}.", err=True)
