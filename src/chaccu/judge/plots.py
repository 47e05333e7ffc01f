"""`draw_radar` and `draw_heat_map`: plots as SVG, to stand inside an HTML page.

Invariants: each has a title and a description for those who do not see it, every number is there as text, and what colour says
is also said by dashes, marks or figures; no font, script or file from elsewhere. Equal data give equal bytes. It ignores what
the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

MOST_LINES = 6
LEAST_AXES = 3
_DASHES = ("", "7 4", "2 4", "10 3 2 3", "1 3", "12 5")
_MARKS = ("circle", "square", "triangle", "diamond", "cross", "ring")
# Longest name that is drawn in full: around a radar there is room for so much, and names must leave a phone room for cells.
_AXIS_CHARS, _NAME_CHARS = 15, 28
_RADIUS, _CENTRE_X, _CENTRE_Y = 150, 280, 205
_WIDTH, _HEIGHT = 560, 410


def draw_radar(
    name: str, title: str, axes: Sequence[str], lines: Sequence[tuple[str, Sequence[float | None]]], *, top: float, unit: str
) -> str:
    """Each line has a value from 0 to `top` on each axis; a value that is None is left out. `name`: of the ids in the page.

    "" with fewer than `LEAST_AXES` axes or more than `MOST_LINES` lines, which nobody could tell apart.
    """
    if len(axes) < LEAST_AXES or not 0 < len(lines) <= MOST_LINES:
        return ""
    said = "; ".join(
        f"{label}: " + ", ".join(f"{axis} {_say(value, unit)}" for axis, value in zip(axes, values, strict=True))
        for label, values in lines
    )
    parts = [_open(name, title, said, _WIDTH, _HEIGHT + 22 * len(lines), "radar")]
    for share in (0.25, 0.5, 0.75, 1.0):
        ring = " ".join(_point(index, len(axes), share) for index in range(len(axes)))
        parts.append(f'<polygon class="ring" points="{ring}"/>')
    parts.append(f'<text class="soft" x="{_CENTRE_X + 4}" y="{_CENTRE_Y - _RADIUS - 4}">{_say(top, unit)}</text>')
    for index, axis in enumerate(axes):
        x, y = _place(index, len(axes), 1.0)
        parts.append(f'<line class="ring" x1="{_CENTRE_X}" y1="{_CENTRE_Y}" x2="{x:.1f}" y2="{y:.1f}"/>')
        label_x, label_y = _place(index, len(axes), 1.14)
        anchor = "middle" if abs(label_x - _CENTRE_X) < 20 else "start" if label_x > _CENTRE_X else "end"
        parts.append(f'<text x="{label_x:.1f}" y="{label_y + 4:.1f}" text-anchor="{anchor}">{_label(axis, _AXIS_CHARS)}</text>')
    for number, (label, values) in enumerate(lines):
        kept = [(index, value / top) for index, value in enumerate(values) if value is not None]
        points = " ".join(_point(index, len(axes), share) for index, share in kept)
        parts.append(f'<polygon class="line line{number}" stroke-dasharray="{_DASHES[number]}" points="{points}"/>')
        parts += [_mark(number, *_place(index, len(axes), share)) for index, share in kept]
        y = _HEIGHT + 22 * number + 4
        parts.append(
            f'<line class="line line{number}" stroke-dasharray="{_DASHES[number]}" x1="40" y1="{y}" x2="90" y2="{y}"/>'
            f'{_mark(number, 65, y)}<text x="100" y="{y + 4}">{_label(label, _NAME_CHARS)}</text>'
        )
    return "".join([*parts, "</svg>"])


def draw_heat_map(
    name: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    *,
    top: float,
    unit: str,
) -> str:
    """A cell for each row and column, from 0 to `top`, with its number in it; "–" where it is None."""
    if not rows or not columns:
        return ""
    left_chars, above_chars = (min(_NAME_CHARS, max(len(one) for one in names)) for names in (rows, columns))
    # The heads of columns are turned by half a right angle.
    left, above, wide, high = 7.5 * left_chars + 20, 5.5 * above_chars + 22, 68, 30
    said = "; ".join(
        f"{row}: " + ", ".join(f"{column} {_say(value, unit)}" for column, value in zip(columns, line, strict=True))
        for row, line in zip(rows, cells, strict=True)
    )
    parts = [_open(name, title, said, left + wide * len(columns) + above, above + high * len(rows) + 8, "heat")]
    for index, column in enumerate(columns):
        x, y = left + wide * index + wide / 2, above - 8
        parts.append(f'<text x="{x:g}" y="{y:g}" transform="rotate(-45 {x:g} {y:g})">{_label(column, _NAME_CHARS)}</text>')
    for place, (row, line) in enumerate(zip(rows, cells, strict=True)):
        y = above + high * place
        parts.append(f'<text x="{left - 8:g}" y="{y + 20:g}" text-anchor="end">{_label(row, _NAME_CHARS)}</text>')
        for index, value in enumerate(line):
            x = left + wide * index
            share = 0.0 if value is None else min(1.0, max(0.0, value / top))
            parts.append(
                f'<rect class="cell" x="{x:g}" y="{y:g}" width="{wide - 2}" height="{high - 2}" '
                f'fill-opacity="{0.5 * share:.3f}"/>'
                f'<text x="{x + wide / 2 - 1:g}" y="{y + 19:g}" text-anchor="middle">{_say(value, unit)}</text>'
            )
    return "".join([*parts, "</svg>"])


def _open(name: str, title: str, said: str, width: float, height: float, kind: str) -> str:
    return (
        f'<svg class="{kind}" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(said)}</desc>'
    )


def _label(text: str, longest: int) -> str:
    """A name as it is drawn; where it is cut, whoever points at it reads all of it."""
    if len(text) <= longest:
        return escape(text)
    return f"{escape(text[: longest - 1])}…<title>{escape(text)}</title>"


def _say(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if unit == "%" else f"{value:.1f}"


def _place(index: int, count: int, share: float) -> tuple[float, float]:
    angle = 2 * math.pi * index / count - math.pi / 2
    return _CENTRE_X + _RADIUS * share * math.cos(angle), _CENTRE_Y + _RADIUS * share * math.sin(angle)


def _point(index: int, count: int, share: float) -> str:
    x, y = _place(index, count, share)
    return f"{x:.1f},{y:.1f}"


def _mark(number: int, x: float, y: float) -> str:
    """A shape of its own for each line."""
    shape = _MARKS[number]
    kind = f'class="mark line{number}"'
    if shape in ("circle", "ring"):
        hollow = " hollow" if shape == "ring" else ""
        return f'<circle class="mark line{number}{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
        "diamond": ((0, -6), (5, 0), (0, 6), (-5, 0)),
        "cross": ((-5, -1), (-1, -1), (-1, -5), (1, -5), (1, -1), (5, -1), (5, 1), (1, 1), (1, 5), (-1, 5), (-1, 1), (-5, 1)),
    }[shape]
    points = " ".join(f"{x + across:.1f},{y + down:.1f}" for across, down in corners)
    return f'<polygon {kind} points="{points}"/>'
