"""`chaccu judge score`: a judge's raw texts into totals, grades and counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from chaccu.judge import Review, ScoreReport

_MOST_NAMED = 20


def score_command(
    reviews: Annotated[
        Path, typer.Argument(metavar="REVIEWS.jsonl", help='{"question_id", "text", …} a line; in gzip if it ends in .gz.')
    ],
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    battles: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="File to write for chaccu rank: a battle a review of two answers.")
    ] = None,
    questions: Annotated[str | None, typer.Option(help="Question set or file, for the categories.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Read the scores, grades and choices out of a judge's texts, and add them up.

    What cannot be read is counted and named, and is a battle without a winner. Results that a line stores beside its text are
    compared with the text.
    """
    import msgspec

    from chaccu.artifact import refuse_to_replace, write_json
    from chaccu.errors import UsageError
    from chaccu.judge import load_questions, read_reviews, score_reviews

    if battles is not None and battles.suffix != ".jsonl":
        raise UsageError(f"{battles} ends in {battles.suffix or 'nothing'}.", remedy="a name that ends in .jsonl")
    refuse_to_replace([reviews], [path for path in (out, battles) if path is not None])
    loaded = read_reviews(reviews)
    with_text = [one for one in loaded if one.text is not None]
    if repeats := len(with_text) - len(set(with_text)):
        typer.echo(f"warning: {repeats} reviews say what another says, word for word on the same; each counts", err=True)
    if questions is not None:
        category = {str(question.question_id): question.category for question in load_questions(questions)}
        if unknown := [one for one in loaded if not one.category and str(one.question_id) not in category]:
            said = f"{len(unknown)} of {len(loaded)} reviews, the first on question {unknown[0].question_id}"
            typer.echo(f"warning: {said}, have no category: {questions} does not have their questions", err=True)
        loaded = [
            msgspec.structs.replace(one, category=one.category or category.get(str(one.question_id), "")) for one in loaded
        ]
    report = score_reviews(loaded)
    if out is not None:
        write_json(out, report)
    if battles is not None:
        _write_battles(battles, loaded)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _say_sums(report)
        _say_doubts(report)


def _write_battles(file: Path, reviews: list[Review]) -> None:
    from chaccu.errors import DataError
    from chaccu.judge.json_lines import write_json_lines
    from chaccu.judge.score import list_battles

    found = list_battles(reviews)
    if not found.battles:
        raise DataError(
            f"none of {len(reviews)} reviews is of two named models.", remedy="name model_a and model_b in each line"
        )
    write_json_lines(file, found.battles)
    open_ones = sum(one.winner is None for one in found.battles)
    typer.echo(
        f"{file}: {len(reviews)} reviews = {len(found.battles)} battles ({open_ones} without a winner) + {found.grades} grades "
        f"+ {found.unnamed} that name no two models",
        err=True,
    )


def _say_sums(report: ScoreReport) -> None:
    for name, pair in report.pairs.items():
        share = "" if pair.ratio_b_over_a is None else f" ({100 * pair.ratio_b_over_a:.2f} %)"
        total = f"{pair.total[0]:.10g}–{pair.total[1]:.10g}{share}, " if pair.scored else ""
        typer.echo(
            f"{name}: {total}first better {pair.a_win}, tie {pair.tie}, second better {pair.b_win}, unparsed {pair.unparsed}"
        )
        for category, sums in sorted(pair.by_category.items()):
            total = f"{sums.total[0]:.10g}–{sums.total[1]:.10g}, " if sums.scored else ""
            typer.echo(f"  {category}: {total}{sums.a_win} / {sums.tie} / {sums.b_win}")
    for name, grades in report.models.items():
        typer.echo(
            f"{name}: {_average(grades.average)} of {grades.reviews - grades.unparsed} grades, unparsed {grades.unparsed}"
        )
        for turn, part in sorted(grades.by_turn.items()):
            typer.echo(f"  turn {turn}: {_average(part.average)}")
        for category, part in sorted(grades.by_category.items()):
            typer.echo(f"  {category}: {_average(part.average)}")
    without = f" + {report.without_text} without a text, counted by the result on file" if report.without_text else ""
    is_scored = any(pair.scored for pair in report.pairs.values())
    elsewhere = f"; {report.unlike_first_line} state their scores elsewhere than in the first line" if is_scored else ""
    typer.echo(f"{report.reviews} reviews = {report.parsed} parsed + {len(report.unparsed)} unparsed{without}{elsewhere}")


def _average(value: float | None) -> str:
    return "no average" if value is None else f"average {value:.4f}"


def _say_doubts(report: ScoreReport) -> None:
    for one in report.unparsed[:_MOST_NAMED]:
        typer.echo(f"unparsed: {_place(one.question_id, one.turn, one.pair, one.review_id)}", err=True)
    if len(report.unparsed) > _MOST_NAMED:
        typer.echo(f"unparsed: {len(report.unparsed) - _MOST_NAMED} more; --out or --json names them all", err=True)
    for other in report.contradictions[:_MOST_NAMED]:
        typer.echo(
            f"contradiction: {_place(other.question_id, other.turn, other.pair, other.review_id)} has {_result(other.stored)} "
            f"on file, and its text says {_result(other.text)}",
            err=True,
        )
    if len(report.contradictions) > _MOST_NAMED:
        typer.echo(f"contradiction: {len(report.contradictions) - _MOST_NAMED} more; --out or --json names them all", err=True)


def _place(question_id: int | str, turn: int | None, pair: str, review_id: str) -> str:
    return f"question {question_id}{'' if turn is None else f', turn {turn},'} of {pair} {review_id}".rstrip()


def _result(result: tuple[float, ...] | str) -> str:
    return result if isinstance(result, str) else " ".join(f"{one:g}" for one in result)
