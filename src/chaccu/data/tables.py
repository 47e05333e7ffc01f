"""Parquet files as JSON lines, so that a table's rows are records like any other.

Invariants: memory is that of a few row groups, however long the table; of many columns only those that a reader reads are
read (all, if there is none of them). A file without its table of contents (at its end, so a file that is cut off has none)
raises one `DataError` that names it; a damaged row group ends the stream, and the rows before it are read.
"""

from __future__ import annotations

from pathlib import Path

from chaccu.data.readers import list_columns
from chaccu.errors import DataError

PARQUET_MAGIC = b"PAR1"
_BATCH_ROWS = 200


class TableStream:
    """The rows of a parquet file as JSON lines. `share_read`, from 0 to 1, is how far it has been read.

    Raises `DataError` when the file is no whole table.
    """

    def __init__(self, path: Path, origin: str) -> None:
        import polars

        # A damaged page may end in a panic of the library, which is no ordinary exception.
        self.damage_errors: tuple[type[BaseException], ...] = (
            polars.exceptions.PolarsError,
            polars.exceptions.PanicException,
        )
        try:
            table = polars.scan_parquet(path, glob=False, hive_partitioning=False)
            names = table.collect_schema().names()
            self._rows = table.select(polars.len()).collect().item()
        except self.damage_errors as error:
            raise DataError(
                f"{origin} is a parquet file that is cut off or damaged: {str(error).splitlines()[0]}.",
                remedy="download it again",
            ) from error
        wanted = [name for name in names if name in list_columns()]
        self._batches = table.select(wanted or names).collect_batches(
            chunk_size=_BATCH_ROWS, maintain_order=True, lazy=True, engine="streaming"
        )
        self._rows_read = 0
        self._buffer = memoryview(b"")

    @property
    def share_read(self) -> float:
        return self._rows_read / self._rows if self._rows else 1.0

    def read1(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end."""
        while not self._buffer:
            batch = next(self._batches, None)
            if batch is None:
                return b""
            self._rows_read += batch.height
            self._buffer = memoryview(batch.write_ndjson().encode())
        piece = bytes(self._buffer[:size])
        self._buffer = self._buffer[size:]
        return piece

    def close(self) -> None:
        """Let go of what has been read."""
        self._buffer = memoryview(b"")
