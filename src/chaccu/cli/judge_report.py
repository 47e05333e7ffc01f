"""`chaccu judge report`, `gate` and `calibrate`: what verdicts on file come to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from chaccu.judge.calibrate import BothWays, Calibration
    from chaccu.judge.gate import Gate
    from chaccu.judge.report import JudgeReport

_MOST_NAMED = 20


def register(app: typer.Typer) -> None:
    """Add the commands to `chaccu judge`."""
    app.command("report", epilog="Example: chaccu judge report runs/verdicts --out runs/report")(report_command)
    app.command("gate", epilog="Example: chaccu judge gate tuned --against base --verdicts runs/verdicts")(gate_command)
    app.command("calibrate", epilog="Example: chaccu judge calibrate votes.jsonl --verdicts runs/verdicts")(calibrate_command)


def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Judging folders: verdicts.jsonl and more.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.md, report.html; the first, if none.")
    ] = None,
    answers: Annotated[
        list[Path] | None, typer.Option(help="Answers, a folder or file, for their lengths; repeatable.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The model that the others are set against.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other resamples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Write a report of what judges said: wins, totals, grades, ratings, and how far the judges can be trusted.

    Verdicts that failed or could not be read are counted, and are in no figure. Equal folders and seed give equal files.
    """
    import msgspec

    from chaccu.judge.judged_folder import read_judged
    from chaccu.judge.report import build_report
    from chaccu.judge.report_pages import write_report

    report = build_report(read_judged(folders, answers or ()), baseline=baseline, seed=seed)
    paths = write_report(report, out or folders[0])
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _say_report(report)
        typer.echo(f"written: {', '.join(str(path) for path in paths)}")


def gate_command(
    candidate: Annotated[str, typer.Argument(help="The model that may be promoted.")],
    against: Annotated[str, typer.Option(help="The model in use.")],
    verdicts: Annotated[list[Path], typer.Option(help="Judging folder; repeatable.")],
    judge: Annotated[list[str] | None, typer.Option(help="Count this judge only; repeatable.")] = None,
    min_win_rate: Annotated[float, typer.Option(min=0, max=1, help="The lower end of the win rate must be above this.")] = 0.5,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of the two-sided interval.")] = 0.95,
    max_missing: Annotated[float, typer.Option(min=0, max=1, help="Largest share of comparisons without a result.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other resamples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as one JSON object.")] = False,
) -> None:
    """Promote a candidate only if it is surely better than the model in use.

    A tie is half a win, and the interval is by question. Exit code 0: promoted; 1: not; 2: too much is missing to tell.
    """
    import msgspec

    from chaccu.judge.gate import decide_gate
    from chaccu.judge.judged_folder import read_judged

    gate = decide_gate(
        read_judged(verdicts),
        candidate,
        against,
        judges=judge or (),
        min_win_rate=min_win_rate,
        confidence=confidence,
        max_missing=max_missing,
        seed=seed,
    )
    if as_json:
        typer.echo(msgspec.json.encode(gate).decode())
    else:
        _say_gate(gate)
    raise typer.Exit(gate.exit_code)


def calibrate_command(
    votes: Annotated[
        Path, typer.Argument(metavar="VOTES", help="JSONL or CSV: question_id, turn, model_a, model_b, winner, judge.")
    ],
    verdicts: Annotated[list[Path], typer.Option(help="Judging folder; repeatable.")],
    people: Annotated[str, typer.Option(help="Count votes of these judges only, such as 'expert_*'.")] = "*",
    first_turn: Annotated[int, typer.Option(min=0, max=1, help="The number that the votes give to the first turn.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other resamples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the calibrations as one JSON array.")] = False,
) -> None:
    """Say how far judges agree with your people, and how far the people agree with one another."""
    import msgspec

    from chaccu.artifact import write_json
    from chaccu.judge.calibrate import calibrate
    from chaccu.judge.judged_folder import read_judged
    from chaccu.judge.votes import read_votes

    judged = read_judged(verdicts)
    given = read_votes(votes, judges=people, first_turn=first_turn)
    found = calibrate(given, judged.verdicts, judged.failures, seed=seed)
    if people != "*":
        others = len(read_votes(votes, first_turn=first_turn)) - len(given)
        typer.echo(f"{len(given)} votes of {people}; {others} of others are left out", err=True)
    if out is not None:
        write_json(out, found)
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    for one in found:
        _say_calibration(one)


def _say_report(report: JudgeReport) -> None:
    from chaccu.judge.report_pages import say_mean, say_percent
    from chaccu.judge.tallies import ALL

    for tally in report.pairs:
        if tally.category == ALL:
            typer.echo(
                f"{tally.model} against {tally.other}, by {tally.judge}: win rate {say_percent(tally.win_rate)}; "
                f"{tally.wins} won, {tally.ties} tied ({tally.flips} flips), {tally.losses} lost, {tally.unparsed} unparsed, "
                f"{tally.failed} failed"
            )
    for total in report.totals:
        typer.echo(
            f"{total.model} against {total.reference}, by {total.judge}: {total.total:.10g}–{total.reference_total:.10g}, "
            f"{say_percent(total.share)} of the reference, n {total.n}"
        )
    for grade in report.grades:
        if grade.category == ALL and grade.turn is None:
            typer.echo(
                f"{grade.model}, by {grade.judge}: mean grade {say_mean(grade.mean)}, n {grade.mean.n}, "
                f"{grade.unparsed} unparsed, {grade.failed} failed"
            )
    lost = f" + {report.lost} lost" if report.lost else ""
    typer.echo(f"{report.asked} asked = {report.parsed} parsed + {report.unparsed} unparsed + {report.failed} failed{lost}")
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _say_gate(gate: Gate) -> None:
    from chaccu.judge.report_pages import say_percent

    typer.echo(f"{gate.candidate} against {gate.baseline}: {gate.decision}: {gate.reason}")
    if gate.tally is not None:
        tally = gate.tally
        typer.echo(
            f"win rate {say_percent(tally.win_rate)} at {gate.confidence:g}: {tally.wins} won, {tally.ties} tied "
            f"({tally.flips} flips), {tally.losses} lost, on {tally.win_rate.questions} questions, by {', '.join(gate.judges)}"
        )
    typer.echo(f"{gate.asked} comparisons = {gate.asked - gate.missing} counted + {gate.missing} missing")
    if gate.replaced:
        typer.echo(
            f"warning: {gate.replaced} verdicts have the ids of earlier ones, were asked otherwise and replace them.", err=True
        )
    for name in gate.unfinished:
        typer.echo(f"warning: no manifest.json in {name}: whether its run came to an end is not known.", err=True)


def _say_calibration(one: Calibration) -> None:
    typer.echo(
        f"{one.judge}: {one.votes} votes = {one.compared} compared + {one.unread} unread + {one.without_verdict} not judged "
        f"+ {one.no_winner} without a winner + {one.repeated} repeated"
    )
    _say_both_ways("with your people", one.agreement)
    if one.human is None:
        typer.echo("  your people among themselves: no pair was voted on twice, so the ceiling is not known")
    else:
        _say_both_ways("your people among themselves", one.human)
    if len(one.by_category) > 1:
        for category, figures in one.by_category.items():
            _say_both_ways(f"in {category or 'no category'}", figures)
    for label, counts in one.confusion.items():
        said = ", ".join(f"{vote} {count}" for vote, count in counts.items())
        typer.echo(f"  where the judge says {label}, the votes say: {said}")
    opposite = [found for found in one.contradictions if found.is_opposite]
    typer.echo(f"  against most votes: {len(one.contradictions)} of {one.items} pairs, {len(opposite)} with the other winner")
    for found in opposite[:_MOST_NAMED]:
        turn = "" if found.turn is None else f" turn {found.turn}"
        typer.echo(f"    question {found.question_id}{turn}: {found.model_a}, {found.model_b}")
    if len(opposite) > _MOST_NAMED:
        typer.echo(f"    {len(opposite) - _MOST_NAMED} more; --json or --out names them all")
    typer.echo(f"  about {one.more_votes} more votes like these give agreement to within 5 points")


def _say_both_ways(name: str, figures: BothWays) -> None:
    from chaccu.judge.report_pages import say_percent

    ties, decided = figures.with_ties, figures.no_ties
    kappa = "" if ties.kappa is None else f", kappa {ties.kappa:.3f}"
    typer.echo(
        f"  {name}: {ties.agree} of {ties.total} agree, {say_percent(ties.rate)}{kappa}; "
        f"without ties {decided.agree} of {decided.total}, {say_percent(decided.rate)}"
    )
