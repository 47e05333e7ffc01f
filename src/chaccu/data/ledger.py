"""The ledger: every record that was dropped or changed, by step and reason, and the counts that must add up.

Invariant: read = kept + the sum of dropped; `Counts.check` raises when it does not hold. Rows go to disk as they come, so
the ledger costs no memory; `close` turns them into Parquet, in the order of the input.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec

from chaccu.errors import DataError

Action = Literal["dropped", "changed"]


class LedgerRow(msgspec.Struct, frozen=True):
    """One thing that was done to one record. `before_chars` and `after_chars` count the characters of its turns (for a
    record that could not be read, its bytes); a dropped record's `after_chars` is 0."""

    id: str
    origin: str
    step: str
    action: Action
    reason: str
    before_chars: int
    after_chars: int


class Counts(msgspec.Struct):
    """Records by fate; `dropped[step][reason]` and `changed[step][reason]` count records."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, dict[str, int]] = {}
    changed: dict[str, dict[str, int]] = {}

    def count(self, row: LedgerRow) -> None:
        """Add one ledger row."""
        reasons = (self.dropped if row.action == "dropped" else self.changed).setdefault(row.step, {})
        reasons[row.reason] = reasons.get(row.reason, 0) + 1

    @property
    def total_dropped(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.dropped.values())

    def check(self) -> None:
        """Raise `DataError` unless read = kept + dropped."""
        if self.read != self.kept + self.total_dropped:
            raise DataError(
                f"the counts do not add up: read {self.read:,}, kept {self.kept:,}, dropped {self.total_dropped:,}.",
                remedy="this is a fault in Chaccu; please report it with the configuration",
            )


class LedgerWriter:
    """Writes `ledger.parquet` into a folder; a context manager. `counts` grows with every row."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.parquet"
        self._rows_path = folder / "ledger.jsonl"
        self._encoder = msgspec.json.Encoder()
        self.counts = Counts()

    def __enter__(self) -> LedgerWriter:
        self._rows = self._rows_path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._rows.close()
        if kind is None:
            self._write_parquet()

    def add(self, row: LedgerRow) -> None:
        """Write one row and count it."""
        self._rows.write(self._encoder.encode(row) + b"\n")
        self.counts.count(row)

    def _write_parquet(self) -> None:
        import polars

        integer = {"before_chars", "after_chars"}
        schema = {name: polars.Int64() if name in integer else polars.String() for name in LedgerRow.__struct_fields__}
        if self._rows_path.stat().st_size:
            polars.scan_ndjson(self._rows_path, schema=schema).sink_parquet(self.path, compression="zstd", maintain_order=True)
        else:
            polars.DataFrame(schema=schema).write_parquet(self.path, compression="zstd")
        self._rows_path.unlink()
