"""`ConversationStore`: where the conversation log keeps its lines, files or a database; `open_store` opens one.

Invariants: a store is tried when it is opened, before anything listens; it keeps lines in the order given, each whole or not at
all, beside those of other gateways; what it does not keep it counts. It may block: only the log's own thread calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

import msgspec

from chaccu.errors import MissingDependencyError, ServeError, UsageError
from chaccu.serve.gateway.records.logged_answer import LogLine


class Record(msgspec.Struct, frozen=True):
    """A line, its JSON without a newline, and when its answer ended (UTC)."""

    line: LogLine
    data: bytes
    moment: datetime


class NotKeptError(ServeError):
    """`count` records are not kept; the message says why, without a word of them."""

    def __init__(self, why: str, count: int) -> None:
        super().__init__(why)
        self.count = count


class ConversationStore(Protocol):
    """`most_at_once`: how many answers are best written together."""

    most_at_once: int

    def write(self, records: Sequence[Record]) -> None:
        """Keep `records`. Raises `NotKeptError` for those that are not."""
        ...

    def close(self) -> None:
        """Nothing more will be written."""
        ...


def open_store(folder: Path | None, records_url: str) -> tuple[ConversationStore, str] | None:
    """The store in `folder` or at `records_url` with its name for people, None where neither is given.

    Raises `UsageError` where both are, or for a URL of no known database, `StorageError` when the store cannot be written,
    `MissingDependencyError` without the database's libraries.
    """
    if folder is not None and records_url:
        raise UsageError("conversations are kept in one place.", remedy="either --log-conversations or --records")
    if folder is not None:
        from chaccu.serve.gateway.records.log_folder import LogFolder

        return LogFolder(folder), str(folder)
    if not records_url:
        return None
    try:
        from chaccu.serve.gateway.records.sql_records import SqlRecords

        store = SqlRecords(records_url)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "SQLAlchemy", extra="records", needed_for="--records") from error
    return store, store.shown
