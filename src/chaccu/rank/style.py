"""How answers look: their length, headers, list items and bold passages, counted out of Markdown or read from columns.

Invariants: what stands in fenced code is part of the length and of nothing else; the difference of two sides is their
relative one, (left − right) / (left + right), 0 where both have none, so that it lies between −1 and 1 (as the style control
of Chatbot Arena has it, Li et al. 2024, "Does style matter?"). It ignores what answers say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    Array = np.ndarray[Any, Any]

STYLES = ("length", "headers", "lists", "bold")
_TEXTS = ("answer", "text", "response", "output", "conversation")
_FENCE = r"(?ms)^[ \t]*`{3,}[^`\n]*$.*?(?:^[ \t]*`{3,}[ \t\r]*$|\z)"
_HEADER = r"(?m)^ {0,3}#{1,6}[ \t]+\S"
_LIST = r"(?m)^[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+\S"
_BOLD = r"\*\*[^*\s](?:[^*\n]*[^*\s])?\*\*|__[^_\s](?:[^_\n]*[^_\s])?__"
_ARENA = "conv_metadata"


class StyleColumns(msgspec.Struct, frozen=True):
    """Counts of each row: columns `STYLE_a` and `STYLE_b` for each of `styles`."""

    counts: pl.DataFrame
    styles: tuple[str, ...]

    def select(self, styles: Sequence[str]) -> pl.DataFrame:
        """The columns of some of the styles, in their order."""
        return self.counts.select(f"{style}_{side}" for style in styles for side in "ab")

    def check(self, fought: pl.Series, source: str) -> None:
        """Raise `DataError` where a row that is a battle, by the mask `fought`, has no count, or one below 0 or not finite."""
        for column in self.counts.columns:
            values = self.counts[column]
            wrong = fought & ~(values.is_finite() & (values >= 0)).fill_null(False)
            if wrong.any():
                row = int(wrong.arg_true()[0])
                what = f"tells no {column}" if values[row] is None else f"has {values[row]:g} as its {column}"
                raise DataError(
                    f"battle {row + 1} of {source} {what} ({wrong.sum()} of {len(values)} battles are wrong).",
                    remedy="fill in counts from 0 on, or rank without --style",
                )


def count_style(texts: Sequence[str]) -> Array:
    """(N, 4) counts in N Markdown texts: characters, headers, list items, bold passages."""
    import polars as pl

    return _count(pl.Series("text", texts, dtype=pl.String)).to_numpy()


def find_style_columns(frame: pl.DataFrame, source: str) -> StyleColumns:
    """What a table of battles tells of style: columns such as `length_a` and `length_b` (or headers, lists, bold), Chatbot
    Arena's `conv_metadata`, or texts in `answer_a` and `answer_b` (or text, response, output, conversation).

    A conversation is a list of messages, of which the assistant's count. Counts on file go before texts; what is missing is
    null. Raises `DataError` where there is neither.
    """
    import polars as pl

    if _ARENA in frame.columns and isinstance(frame.schema[_ARENA], pl.Struct):
        found = _of_arena(frame)
    else:
        found = frame.select(
            pl.col(f"{style}_{side}").cast(pl.Float64, strict=False)
            for style in STYLES
            for side in "ab"
            if {f"{style}_a", f"{style}_b"} <= set(frame.columns)
        )
    if not found.columns:
        found = _of_texts(frame, source)
    return StyleColumns(found, tuple(style for style in STYLES if f"{style}_a" in found.columns))


def relative_difference(counts: pl.DataFrame, styles: Sequence[str]) -> Array:
    """(N, K): (a − b) / (a + b) of each style's columns, 0 where both are 0."""
    import numpy as np

    left, right = (counts.select(f"{style}_{side}" for style in styles).to_numpy() for side in "ab")
    total = left + right
    return np.asarray(np.divide(left - right, total, out=np.zeros_like(total, dtype=np.float64), where=total != 0))


def _count(texts: pl.Series) -> pl.DataFrame:
    import polars as pl

    prose = pl.col("text").str.replace_all(_FENCE, "")
    return texts.to_frame("text").select(
        pl.col("text").str.len_chars().cast(pl.Float64).alias("length"),
        prose.str.count_matches(_HEADER).cast(pl.Float64).alias("headers"),
        prose.str.count_matches(_LIST).cast(pl.Float64).alias("lists"),
        prose.str.count_matches(_BOLD).cast(pl.Float64).alias("bold"),
    )


def _of_texts(frame: pl.DataFrame, source: str) -> pl.DataFrame:
    import polars as pl

    name = next((name for name in _TEXTS if {f"{name}_a", f"{name}_b"} <= set(frame.columns)), None)
    if name is None:
        raise DataError(
            f"{source} tells no style: it has the columns {', '.join(frame.columns)}.",
            remedy="add answer_a and answer_b with the texts, or length_a, length_b, headers_a, …; or rank without --style",
        )
    left, right = (_count(_plain_text(frame[f"{name}_{side}"])) for side in "ab")
    return left.select(pl.all().name.suffix("_a")).hstack(right.select(pl.all().name.suffix("_b")))


def _plain_text(values: pl.Series) -> pl.Series:
    """Texts as they are; of lists of messages, the assistant's joined."""
    import polars as pl

    if not isinstance(values.dtype, pl.List):
        return values.cast(pl.String)
    messages = pl.element().struct
    spoken = pl.when(messages.field("role") == "assistant").then(messages.field("content")).otherwise(None)
    return values.to_frame("text").select(pl.col("text").list.eval(spoken).list.drop_nulls().list.join("\n"))["text"]


def _of_arena(frame: pl.DataFrame) -> pl.DataFrame:
    """Tokens of the assistant, and headers, lists and bold passages of all levels and kinds added up."""
    import polars as pl

    schema = dict(frame.schema[_ARENA])  # type: ignore[call-overload]
    columns = []
    for style, pattern in (
        ("length", "sum_assistant_{}_tokens"),
        ("headers", "header_count_{}"),
        ("lists", "list_count_{}"),
        ("bold", "bold_count_{}"),
    ):
        if pattern.format("a") not in schema or pattern.format("b") not in schema:
            continue
        for side in "ab":
            name = pattern.format(side)
            value = pl.col(_ARENA).struct.field(name)
            if isinstance(schema[name], pl.Struct):
                parts = [value.struct.field(part.name) for part in schema[name].fields]
                value = pl.when(pl.any_horizontal(part.is_not_null() for part in parts)).then(pl.sum_horizontal(parts))
            columns.append(value.cast(pl.Float64).alias(f"{style}_{side}"))
    return frame.select(columns)
