"""`write_leaderboard`: a ranking as JSON, CSV, Markdown, or one page of HTML that needs nothing else.

Invariants: all forms have the models in the ranking's order, and a rating that is not determined is empty or a dash, never
a number; the page holds no reference to another address. Only JSON has the pairs. It ignores how the ranking was made.
"""

from __future__ import annotations

import csv
import io
from importlib import resources
from itertools import groupby
from pathlib import Path

import jinja2
import msgspec

from chaccu.artifact import atomic_file, write_json
from chaccu.errors import UsageError
from chaccu.rank.ranking import Ranking, Rating

FORMS = (".json", ".csv", ".md", ".html")
# Both kinds of intervals count on many questions, and are too narrow with few.
FEW_QUESTIONS = 20
_DASH = "–"
_MARKDOWN = "\\`*_[]<>|"


def check_form(path: Path) -> None:
    """Raise `UsageError` unless the end of the name is one of `FORMS`."""
    if path.suffix not in FORMS:
        raise UsageError(f"{path} ends in {path.suffix or 'nothing'}.", remedy=f"a name that ends in {', '.join(FORMS)}")


def write_leaderboard(path: Path, ranking: Ranking) -> None:
    """Write the form that the end of the name tells, whole or not at all. Raises `UsageError` for another end."""
    check_form(path)
    if path.suffix == ".json":
        write_json(path, ranking)
        return
    text = {".csv": _to_csv, ".md": _to_markdown, ".html": _to_html}[path.suffix](ranking)
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def _to_csv(ranking: Ranking) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["place", *Rating.__struct_fields__])
    for part in _parts(ranking):
        for place, row in enumerate(part, start=1):
            writer.writerow([place, *("" if value is None else value for value in msgspec.structs.astuple(row))])
    return text.getvalue()


def _to_markdown(ranking: Ranking) -> str:
    parts = _parts(ranking)
    lines: list[str] = []
    for part in parts:
        if len(parts) > 1:
            lines += [f"## Component {part[0].component}, tier {part[0].tier}", ""]
        lines += [
            "| # | model | rating | 95 % | ranks | Elo | won | lost | tied |",
            "|---:|---|---:|---|---|---:|---:|---:|---:|",
        ]
        for place, row in enumerate(part, start=1):
            name = "".join(f"\\{letter}" if letter in _MARKDOWN else letter for letter in show_model(row))
            cells = [place, name, show_rating(row), show_interval(row), show_ranks(row), f"{row.elo:.0f}"]
            lines.append(f"| {' | '.join(map(str, [*cells, row.wins, row.losses, row.ties]))} |")
        lines.append("")
    lines += [f"- {line}" for part in describe(ranking) for line in part]
    return "\n".join(lines) + "\n"


def _to_html(ranking: Ranking) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(rating=show_rating, interval=show_interval, ranks=show_ranks)
    page = (resources.files("chaccu.rank") / "leaderboard.html.jinja").read_text(encoding="utf-8")
    ends = [end for row in ranking.ratings for end in (row.low, row.rating, row.high) if end is not None]
    lowest, highest = min(ends, default=0.0), max(ends, default=0.0)
    width = (highest - lowest) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - lowest) / width, 2)

    return environment.from_string(page).render(
        ranking=ranking, parts=_parts(ranking), place=place, notes=[line for part in describe(ranking) for line in part]
    )


def _parts(ranking: Ranking) -> list[list[Rating]]:
    """The rows of each tier, in order."""
    return [list(rows) for _, rows in groupby(ranking.ratings, key=lambda row: (row.component, row.tier))]


def show_model(row: Rating) -> str:
    """The name on one line, without what would steer a terminal."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in row.model).split())


def show_rating(row: Rating) -> str:
    """The rating without decimals, or a dash."""
    return _DASH if row.rating is None else f"{row.rating:.0f}"


def show_interval(row: Rating) -> str:
    """The interval, or a dash."""
    return _DASH if row.low is None or row.high is None else f"{row.low:.0f} … {row.high:.0f}"


def show_ranks(row: Rating) -> str:
    """The ranks that intervals leave open, or a dash."""
    if row.best_rank is None or row.worst_rank is None:
        return _DASH
    return str(row.best_rank) if row.best_rank == row.worst_rank else f"{row.best_rank}–{row.worst_rank}"


def describe(ranking: Ranking) -> tuple[list[str], list[str]]:
    """What a reader must know of a ranking, a sentence a line: facts, of which the counts add up, and warnings."""
    decided = ranking.battles - ranking.ties
    bad = f" ({ranking.both_bad:,} of them both bad)" if ranking.both_bad else ""
    lines = [f"{ranking.battles:,} battles = {decided:,} decided + {ranking.ties:,} ties{bad}, {len(ranking.ratings)} models"]
    unit = f"{ranking.questions:,} questions" if ranking.questions is not None else "battles"
    if ranking.intervals == "sandwich":
        lines.append(f"95 % intervals from sandwich errors by {unit.split()[-1]}")
    elif ranking.bootstraps:
        lines.append(f"95 % intervals from {ranking.bootstraps:,} resamples of {unit}")
    if ranking.tie_model != "half":
        model = {"davidson": "Davidson's model", "rao_kupper": "Rao and Kupper's model", "drop": "left out"}[ranking.tie_model]
        lines.append(f"ties: {model}")
    if ranking.separability is not None:
        lines.append(f"separability: the intervals of {ranking.separability:.1%} of all pairs do not overlap")
    if ranking.distinct is not None:
        lines.append(f"{ranking.distinct:.1%} of all pairs differ with p < 0.05")
    several = len({(effect.component, effect.tier) for effect in ranking.style}) > 1
    for effect in ranking.style:
        place = f" in component {effect.component}, tier {effect.tier}" if several else ""
        if effect.effect is None:
            lines.append(
                f"style not taken out{place}: {effect.style}, which tells no more than who answers and the other styles"
            )
            continue
        interval = "" if effect.low is None or effect.high is None else f" ({effect.low:+.3f} … {effect.high:+.3f})"
        lines.append(f"style taken out{place}: {effect.style} {effect.effect:+.3f}{interval} log-odds a standard deviation")
    warnings = [f"{ranking.unread:,} rows without a winner are not among the battles"] if ranking.unread else []
    if ranking.questions is not None and ranking.questions < FEW_QUESTIONS:
        warnings.append(
            f"the battles are on {ranking.questions} questions; with fewer than {FEW_QUESTIONS} intervals say little"
        )
    if len(ranking.components) > 1:
        warnings.append(f"{len(ranking.components)} components that never met; ratings compare within one only")
    if len(_parts(ranking)) > len(ranking.components):
        warnings.append(
            "between some models every battle went one way, so their distance has no finite value; "
            "they stand in tiers of their own, none beaten by a later one, and ratings compare within a tier only"
        )
    return lines, warnings
