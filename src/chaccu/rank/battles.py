"""`Battles`: who met whom and who won, as arrays.

Invariants: every row becomes one battle, in order, or is counted in `unread`, or the reading stops with the row's number;
models and questions are numbered in the order in which they first appear. It ignores what the answers said, but for their
style where that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.errors import DataError
from chaccu.rank.style import STYLES, StyleColumns, find_style_columns, relative_difference

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    Array = np.ndarray[Any, Any]

LEFT_WINS, TIE, RIGHT_WINS = 0, 1, 2
QUESTION_COLUMN = "question_id"
_COLUMNS = (("model_a", "model_b"), ("left", "right"))
_BOTH_BAD = ("tie (bothbad)", "both_bad", "bothbad")
_OUTCOMES = MappingProxyType(
    {
        **dict.fromkeys(("model_a", "left", "a"), LEFT_WINS),
        **dict.fromkeys(("model_b", "right", "b"), RIGHT_WINS),
        **dict.fromkeys(("tie", *_BOTH_BAD), TIE),
    }
)


class Battles(msgspec.Struct, frozen=True):
    """N battles, as int64 arrays of length N: numbers of models, and `LEFT_WINS`, `TIE` or `RIGHT_WINS`.

    `question`: numbers of questions, None where battles have none. `both_bad`: how many of the ties say that both were bad.
    `unread`: rows without a winner, which are no battles. `style`: (N, K) differences left minus right over their sum, one
    column for each of `styles`.
    """

    models: list[str]
    left: Array
    right: Array
    outcome: Array
    question: Array | None = None
    both_bad: int = 0
    unread: int = 0
    style: Array | None = None
    styles: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.outcome)


def parse_battles(rows: list[tuple[str, str, str]] | list[tuple[str, str, str, str]]) -> Battles:
    """Battles from (model_a, model_b, winner) tuples, or (model_a, model_b, winner, question); no winner is None.

    Raises `DataError` as `read_battles` does.
    """
    import polars as pl

    names = ["model_a", "model_b", "winner", QUESTION_COLUMN][: len(rows[0]) if rows else 3]
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
    return battles_of_frames([(frame, "the list of battles")])


def battles_of_frames(
    frames: list[tuple[pl.DataFrame, str]], *, question_column: str | None = None, with_style: bool = False
) -> Battles:
    """The battles of tables with model_a, model_b and winner; each table has a name for messages.

    Questions come from `question_column`, or from `question_id` where every table has it. Raises `DataError` for a missing
    column, a bad row, or no battle at all.
    """
    import polars as pl

    question = question_column
    if question is None and all(QUESTION_COLUMN in frame.columns for frame, _ in frames):
        question = QUESTION_COLUMN
    told: Sequence[StyleColumns | None] = (
        [find_style_columns(frame, source) for frame, source in frames] if with_style else [None] * len(frames)
    )
    styles = _shared_styles(told, frames) if with_style else ()
    tables = [_read_table(frame, source, question, one, styles) for (frame, source), one in zip(frames, told, strict=True)]
    table = pl.concat([*tables]) if tables else pl.DataFrame(schema={"outcome": pl.Int64})
    fought = table.filter(pl.col("outcome").is_not_null())
    if fought.is_empty():
        names = ", ".join(source for _, source in frames)
        raise DataError(
            f"{names} holds no battle{f': no winner in {table.height} rows' if table.height else ''}.",
            remedy="give at least one row with model_a, model_b and winner",
        )
    models = pl.concat([fought["a"], fought["b"]]).unique(maintain_order=True).to_list()
    left, right = _number(fought["a"], models), _number(fought["b"], models)
    outcome = fought["outcome"].cast(pl.Int64).to_numpy()
    return Battles(
        models,
        left,
        right,
        outcome,
        question=None if question is None else _number(fought["question"], None),
        both_bad=int(fought["both_bad"].sum()),
        unread=table.height - fought.height,
        style=relative_difference(fought, styles) if styles else None,
        styles=styles,
    )


def _read_table(
    frame: pl.DataFrame, source: str, question: str | None, told: StyleColumns | None, styles: tuple[str, ...]
) -> pl.DataFrame:
    """Columns a, b, outcome, both_bad, and question and styles where they are asked for; rows checked."""
    import polars as pl

    sides = next((pair for pair in _COLUMNS if set(pair) <= set(frame.columns)), None)
    if sides is None or "winner" not in frame.columns:
        raise DataError(
            f"{source} has the columns {', '.join(frame.columns) or '(none)'}.",
            remedy="it needs model_a, model_b and winner (model_a | model_b | tie)",
        )
    if question is not None and question not in frame.columns:
        raise DataError(
            f"{source} has no column {question!r}; it has {', '.join(frame.columns)}.",
            remedy="--question-column with one of them",
        )
    for name in (*sides, "winner", *([] if question is None else [question])):
        if frame.schema[name].is_nested():
            raise DataError(f"the column {name!r} of {source} holds lists or objects.", remedy="one name or number a row")

    def plain(name: str) -> pl.Expr:
        return pl.col(name).cast(pl.String).str.strip_chars().replace("", None)

    said = plain("winner")
    table = frame.select(
        plain(sides[0]).alias("a"),
        plain(sides[1]).alias("b"),
        said.alias("said"),
        said.replace_strict(dict(_OUTCOMES), default=None, return_dtype=pl.Int8).alias("outcome"),
        said.is_in(_BOTH_BAD).fill_null(False).alias("both_bad"),
        *([plain(question).alias("question")] if question is not None else []),
    )
    _check_rows(table, source, question)
    if told is None:
        return table.drop("said")
    told.check(table["outcome"].is_not_null(), source)
    return table.drop("said").hstack(told.select(styles))


def _shared_styles(told: Sequence[StyleColumns | None], frames: list[tuple[pl.DataFrame, str]]) -> tuple[str, ...]:
    """The styles that every table tells. Raises `DataError` where there is none."""
    shared = tuple(style for style in STYLES if all(one is not None and style in one.styles for one in told))
    if not shared:
        raise DataError(
            f"{', '.join(source for _, source in frames)} have no style in common.", remedy="give all the same columns"
        )
    return shared


def _number(values: pl.Series, known: list[str] | None) -> Array:
    """Values as int64 numbers, by their place in `known` or by first appearance."""
    import numpy as np
    import polars as pl

    names = pl.Series(known if known is not None else values.unique(maintain_order=True).to_list(), dtype=pl.String)
    numbers = pl.DataFrame({"value": names}).with_row_index("number")
    joined = values.to_frame("value").join(numbers, on="value", how="left", maintain_order="left")
    return joined["number"].to_numpy().astype(np.int64)


def _check_rows(table: pl.DataFrame, source: str, question: str | None) -> None:
    import polars as pl

    wrong = pl.col("a").is_null() | pl.col("b").is_null() | (pl.col("a") == pl.col("b"))
    wrong = wrong | (pl.col("outcome").is_null() & pl.col("said").is_not_null())
    if question is not None:
        wrong = wrong | pl.col("question").is_null()
    bad = table.with_row_index("row", offset=1).filter(wrong)
    if bad.is_empty():
        return
    first = bad.row(0, named=True)
    if first["a"] is None or first["b"] is None:
        what = "names no model on one side"
    elif first["a"] == first["b"]:
        what = f"sets {first['a']} against itself"
    elif first["outcome"] is None and first["said"] is not None:
        what = f"has the winner {first['said']!r:.80}"
    else:
        what = f"has nothing in the column {question!r}"
    raise DataError(
        f"battle {first['row']} of {source} {what} ({bad.height} of {table.height} battles are wrong).",
        remedy="winner is model_a, model_b or tie, and both models are named; mend or take out the rows",
    )
