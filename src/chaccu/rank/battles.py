"""`Battles`: who met whom and who won, out of a CSV or JSONL file.

Invariants: every row of the file becomes one battle, in file order, or the reading stops with the row's number; models are
numbered in the order in which they first appear. It ignores every column but the three it needs.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

LEFT_WINS, TIE, RIGHT_WINS = 0, 1, 2
_COLUMNS = (("model_a", "model_b"), ("left", "right"))
_OUTCOMES = MappingProxyType(
    {
        **dict.fromkeys(("model_a", "left", "a"), LEFT_WINS),
        **dict.fromkeys(("model_b", "right", "b"), RIGHT_WINS),
        **dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), TIE),
    }
)


class Battles(msgspec.Struct, frozen=True):
    """N battles, as int64 arrays of length N: numbers of models, and `LEFT_WINS`, `TIE` or `RIGHT_WINS`."""

    models: list[str]
    left: np.ndarray[Any, Any]
    right: np.ndarray[Any, Any]
    outcome: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.outcome)


def read_battles(path: Path) -> Battles:
    """The battles of a CSV file, or of a JSONL one if its name ends in `.jsonl` or `.ndjson`.

    Columns `model_a`, `model_b`, `winner` (`model_a`, `model_b` or `tie`); `left` and `right` may stand for the models. A
    tie in which both were bad is a tie. Raises `StorageError` for an unreadable file, `DataError` for a missing column or
    a bad row.
    """
    import polars as pl

    with storage_errors(path):
        data = path.read_bytes()
    try:
        if path.suffix in (".jsonl", ".ndjson"):
            frame = pl.read_ndjson(data, infer_schema_length=None) if data.strip() else pl.DataFrame()
        else:
            frame = pl.read_csv(data, infer_schema=False) if data.strip() else pl.DataFrame()
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{path} cannot be read as a table: {str(error).splitlines()[0]}",
            remedy="give CSV with a header line, or JSON objects one a line in a file named .jsonl",
        ) from error
    return _from_frame(frame, str(path))


def parse_battles(rows: list[tuple[str, str, str]]) -> Battles:
    """Battles from (model_a, model_b, winner) tuples. Raises `DataError` as `read_battles` does."""
    import polars as pl

    return _from_frame(pl.DataFrame(rows, schema=["model_a", "model_b", "winner"], orient="row"), "the list of battles")


def _from_frame(frame: pl.DataFrame, source: str) -> Battles:
    import numpy as np
    import polars as pl

    sides = next((pair for pair in _COLUMNS if set(pair) <= set(frame.columns)), None)
    if sides is None or "winner" not in frame.columns:
        raise DataError(
            f"{source} has the columns {', '.join(frame.columns) or '(none)'}.",
            remedy="it needs model_a, model_b and winner (model_a | model_b | tie)",
        )
    table = frame.select(
        pl.col(sides[0]).cast(pl.String).str.strip_chars().replace("", None).alias("a"),
        pl.col(sides[1]).cast(pl.String).str.strip_chars().replace("", None).alias("b"),
        pl.col("winner").cast(pl.String).alias("said"),
        pl.col("winner").cast(pl.String).str.strip_chars().replace_strict(dict(_OUTCOMES), default=None).alias("outcome"),
    )
    if table.is_empty():
        raise DataError(f"{source} holds no battle.", remedy="give at least one row with model_a, model_b and winner")
    _check_rows(table, source)
    models = pl.concat([table["a"], table["b"]]).unique(maintain_order=True).to_list()
    number = {model: index for index, model in enumerate(models)}
    left, right, outcome = (
        table["a"].replace_strict(number).to_numpy(),
        table["b"].replace_strict(number).to_numpy(),
        table["outcome"].to_numpy(),
    )
    return Battles(models, left.astype(np.int64), right.astype(np.int64), outcome.astype(np.int64))


def _check_rows(table: pl.DataFrame, source: str) -> None:
    import polars as pl

    bad = table.with_row_index("row", offset=1).filter(
        pl.col("a").is_null() | pl.col("b").is_null() | pl.col("outcome").is_null() | (pl.col("a") == pl.col("b"))
    )
    if bad.is_empty():
        return
    first = bad.row(0, named=True)
    if first["a"] is None or first["b"] is None:
        wrong = "names no model on one side"
    elif first["outcome"] is None:
        wrong = f"has the winner {first['said']!r}"
    else:
        wrong = f"sets {first['a']} against itself"
    raise DataError(
        f"battle {first['row']} of {source} {wrong} ({bad.height} of {table.height} battles are wrong).",
        remedy="winner is model_a, model_b or tie, and both models are named; mend or take out the rows",
    )
