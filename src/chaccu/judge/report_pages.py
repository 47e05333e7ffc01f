"""`write_report`: a `JudgeReport` as report.json, report.md and a self-contained report.html.

Invariants: the three say the same; the page has no script and nothing from elsewhere, every name out of the data is escaped,
and light and dark follow the reader's system. It ignores how the figures came about.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from chaccu.artifact import atomic_file, write_json
from chaccu.judge.agreement import Agreement
from chaccu.judge.checking import CheckCount
from chaccu.judge.intervals import Estimate
from chaccu.judge.plots import MOST_LINES, draw_heat_map, draw_radar
from chaccu.judge.report import JudgeReport
from chaccu.judge.tallies import ALL
from chaccu.rank import LengthControlled

JSON_NAME, MARKDOWN_NAME, HTML_NAME = "report.json", "report.md", "report.html"
_HIGHEST_GRADE = 10.0


def write_report(report: JudgeReport, folder: Path) -> list[Path]:
    """Write the three files into `folder` and return their paths. Raises `StorageError`."""
    paths = [folder / name for name in (JSON_NAME, MARKDOWN_NAME, HTML_NAME)]
    write_json(paths[0], report)
    for path, text in ((paths[1], render_markdown(report)), (paths[2], render_html(report))):
        with atomic_file(path) as file:
            file.write(text.encode())
    return paths


def render_html(report: JudgeReport) -> str:
    """The whole page."""
    environment = _environment(autoescape=True)
    return environment.from_string(_template("report.html.jinja")).render(r=report, ALL=ALL, plots=draw_plots(report))


def render_markdown(report: JudgeReport) -> str:
    """The same without the plots."""
    environment = _environment(autoescape=False)
    return environment.from_string(_template("report.md.jinja")).render(r=report, ALL=ALL).rstrip() + "\n"


def draw_plots(report: JudgeReport) -> list[tuple[str, Markup]]:
    """Titles and plots of what there is enough data for: a radar and heat-maps of win rates, and the same of grades."""
    wins = {(one.model, one.category): one.win_rate.value for one in report.by_category}
    drawn = _draw_categories("wins", "Win rate by category, a tie is half a win", wins, 1.0, "%")
    for judge in report.judges:
        name = f"grades-{report.judges.index(judge)}"
        grades = {
            (one.model, one.category): one.mean.value for one in report.grades if one.judge == judge.judge and one.turn is None
        }
        # A prompt may have a wider scale than the shipped ones.
        top = max([_HIGHEST_GRADE, *(grade for grade in grades.values() if grade is not None)])
        drawn += _draw_categories(name, f"Mean grade by category, by {judge.judge}", grades, top, "")
    models = sorted({model for model, _ in wins})
    if len(models) > 2:
        several = len({one.judge for one in report.pairs}) > 1
        rates: dict[tuple[str, str], float | None] = {}
        for tally in report.pairs:
            if tally.category == ALL and (not several or tally.judge == ALL):
                value = tally.win_rate.value
                rates[tally.model, tally.other] = value
                rates[tally.other, tally.model] = None if value is None else 1 - value
        cells = [[rates.get((row, column)) for column in models] for row in models]
        title = "Win rate of the row's model against the column's"
        drawn.append((title, draw_heat_map("pairs", title, models, models, cells, top=1.0, unit="%")))
    return [(title, Markup(plot)) for title, plot in drawn if plot]


def _draw_categories(
    name: str, title: str, figures: dict[tuple[str, str], float | None], top: float, unit: str
) -> list[tuple[str, str]]:
    models = sorted({model for model, _ in figures})
    categories = sorted({category for _, category in figures if category != ALL})
    if len(categories) < 2 or not models:
        return []
    cells = [[figures.get((model, category)) for category in categories] for model in models]
    lines = list(zip(models, cells, strict=True))[: MOST_LINES + 1]
    return [
        (title, draw_radar(f"{name}-radar", title, categories, lines, top=top, unit=unit)),
        (title, draw_heat_map(f"{name}-heat", title, models, categories, cells, top=top, unit=unit)),
    ]


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "percent": say_percent,
        "mean": say_mean,
        "agreed": _say_agreement,
        "ratio": _say_ratio,
        "cell": _cell,
        "checked": _say_check,
        "controlled": _say_controlled,
    }
    return environment


def _template(name: str) -> str:
    return (resources.files("chaccu.judge") / name).read_text(encoding="utf-8")


def say_percent(estimate: Estimate) -> str:
    """`61.3 % (52.0–70.1)`; a dash without data."""
    if estimate.value is None:
        return "–"
    interval = "" if estimate.low is None or estimate.high is None else f" ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"
    return f"{100 * estimate.value:.1f} %{interval}"


def say_mean(estimate: Estimate) -> str:
    """`6.10 (5.72–6.48)`; a dash without data."""
    if estimate.value is None:
        return "–"
    interval = "" if estimate.low is None or estimate.high is None else f" ({estimate.low:.2f}–{estimate.high:.2f})"
    return f"{estimate.value:.2f}{interval}"


def _say_agreement(agreement: Agreement) -> str:
    share = "" if agreement.ratio is None else f" ({100 * agreement.ratio:.1f} %)"
    return f"{agreement.agree} of {agreement.total}{share}"


def _say_check(count: CheckCount) -> str:
    low, high = count.interval or (None, None)
    checked = count.passed + count.failed
    return say_percent(Estimate(n=checked, questions=checked, value=count.share, low=low, high=high))


def _say_controlled(found: LengthControlled) -> str:
    return say_percent(Estimate(n=found.counted, questions=found.counted, value=found.win_rate, low=found.low, high=found.high))


def _say_ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _cell(text: object) -> str:
    """A name inside a Markdown table."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]<>|" else letter for letter in str(text))
    return " ".join(escaped.split())
