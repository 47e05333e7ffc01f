"""`read_battles`: battles out of CSV, JSON, JSON Lines and Parquet files, plain or gzipped.

Invariant: the rows of several files follow one another in the order of the files. It ignores the columns that it does not
need.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from chaccu.artifact import storage_errors
from chaccu.errors import DataError
from chaccu.rank.battles import Battles, battles_of_frames

if TYPE_CHECKING:
    import polars as pl

_GZIP = b"\x1f\x8b"


def read_battles(*paths: Path, question_column: str | None = None, with_style: bool = False) -> Battles:
    """The battles of one or more files, by the end of their names: `.jsonl` or `.ndjson`, `.json` (a list of objects),
    `.parquet`, and CSV for all else; `.gz` may follow.

    Columns `model_a`, `model_b`, `winner` (`model_a`, `model_b` or `tie`); `left` and `right` may stand for the models. A
    tie in which both were bad is a tie that is counted; a row without a winner is counted too, and no battle. `question_column`
    names the question (`question_id` if there is one); `with_style` reads style too (see `chaccu.rank.style`). Raises
    `StorageError` for an unreadable file, `DataError` for a missing column or a bad row.
    """
    frames = [(read_frame(path), str(path)) for path in paths]
    return battles_of_frames(frames, question_column=question_column, with_style=with_style)


def read_frame(path: Path) -> pl.DataFrame:
    """The rows of one file, whatever their columns. Raises `StorageError` and `DataError` as `read_battles` does."""
    import polars as pl

    with storage_errors(path):
        data = path.read_bytes()
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    try:
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
        if not data.strip():
            return pl.DataFrame()
        if kind in (".jsonl", ".ndjson"):
            return pl.read_ndjson(data, infer_schema_length=None)
        if kind == ".json":
            return pl.read_json(io.BytesIO(data), infer_schema_length=None)
        if kind == ".parquet":
            return pl.read_parquet(io.BytesIO(data))
        return pl.read_csv(data, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as a table: {str(error).splitlines()[0]}",
            remedy="give CSV with a header line, Parquet, or JSON objects one a line in a file named .jsonl",
        ) from error
