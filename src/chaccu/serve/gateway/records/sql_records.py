"""`SqlRecords`: conversations as rows of `chaccu_answers` in SQLite or PostgreSQL, through SQLAlchemy.

A row has the line's JSON, the same as in a log's file, and beside it what one looks for: id, time, model, finish reason. The
table `chaccu_schema` holds the version of this layout; data's reader of databases knows it too.

Invariants: a database of another version is refused; several gateways may write to one; rows are added in a transaction, and
one that the database refuses costs itself alone; a database that restarts is waited for a few seconds. No error that is told
holds a word of a conversation, nor a password.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import sqlalchemy as sql
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from chaccu.errors import StorageError, UsageError
from chaccu.serve.gateway.records.conversation_store import NotKeptError, Record

SCHEMA_VERSION = 1

_FILE_MODE = 0o600
_CONNECT_S = 5
_LOCKED_S = 10
# For how long, again and again, a database that does not answer is asked.
_ASK_AGAIN_S = (0.1, 0.4, 1.0, 2.0)
# Any number, the same for all gateways: who makes the tables holds the lock by it.
_LOCK = 0x63686163
_layout = sql.MetaData()
_schema = sql.Table("chaccu_schema", _layout, sql.Column("version", sql.Integer, primary_key=True, autoincrement=False))
_answers = sql.Table(
    "chaccu_answers",
    _layout,
    # SQLite counts rows by themselves in a column of this type alone.
    sql.Column("number", sql.BigInteger().with_variant(sql.Integer, "sqlite"), primary_key=True),
    sql.Column("id", sql.Text, nullable=False),
    sql.Column("time", sql.String(30), nullable=False, index=True),
    sql.Column("model", sql.Text, nullable=False),
    sql.Column("finish_reason", sql.Text),
    sql.Column("line", sql.Text, nullable=False),
)


class SqlRecords:
    """The rows of the database at `url`, `sqlite:///FILE` or `postgresql+psycopg://…`; `shown` is the URL without a password.

    Raises `UsageError` for another URL, `StorageError` when the database cannot be used, `ModuleNotFoundError` without its
    driver.
    """

    most_at_once = 100

    def __init__(self, url: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        parsed = _parse(url)
        self.shown = parsed.render_as_string(hide_password=True)
        self._sleep = sleep
        if parsed.get_backend_name() == "sqlite":
            _make_private(Path(parsed.database or ""))
            # Without a pool a file that was taken away is noticed, and not written on unseen.
            self._engine = sql.create_engine(
                parsed, hide_parameters=True, poolclass=NullPool, connect_args={"timeout": _LOCKED_S}
            )
        else:
            timeouts = {"connect_timeout": _CONNECT_S, "tcp_user_timeout": _LOCKED_S * 1000}
            self._engine = sql.create_engine(parsed, hide_parameters=True, pool_pre_ping=True, connect_args=timeouts)
        try:
            self._prepare()
        except SQLAlchemyError as error:
            self.close()
            raise StorageError(
                f"conversations cannot be kept in {self.shown}: {_first_line(error)}.",
                remedy="--records with a database that can be reached, and that you may make tables in",
            ) from error

    def write(self, records: Sequence[Record]) -> None:
        rows = [_row(record) for record in records]
        try:
            self._insert(rows)
            return
        except SQLAlchemyError as error:
            if len(rows) == 1 or _is_outage(error):
                raise NotKeptError(f"{self.shown}: {_explain(error)}", len(rows)) from error
        # One of them is refused; the others are not to go with it.
        kept, why = 0, ""
        for row in rows:
            try:
                self._insert([row])
                kept += 1
            except SQLAlchemyError as error:
                why = _explain(error)
        if kept < len(rows):
            raise NotKeptError(f"{self.shown}: {why}", len(rows) - kept)

    def close(self) -> None:
        self._engine.dispose()

    def _insert(self, rows: list[dict[str, str | None]]) -> None:
        for wait_s in (*_ASK_AGAIN_S, None):
            try:
                with self._engine.begin() as connection:
                    connection.execute(sql.insert(_answers), rows)
                return
            except SQLAlchemyError as error:
                if wait_s is None or not _is_outage(error):
                    raise
            self._sleep(wait_s)

    def _prepare(self) -> None:
        """Make the tables where there are none, and look at their version."""
        for wait_s in (*_ASK_AGAIN_S[:2], None):
            try:
                with self._engine.begin() as connection:
                    if self._engine.dialect.name == "postgresql":
                        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_LOCK)))
                    _layout.create_all(connection)
                    versions = connection.scalars(sql.select(_schema.c.version)).all()
                    if not versions:
                        connection.execute(sql.insert(_schema), {"version": SCHEMA_VERSION})
                break
            except DBAPIError:
                # Another gateway makes the same tables at this moment.
                if wait_s is None:
                    raise
                self._sleep(wait_s)
        if versions and list(versions) != [SCHEMA_VERSION]:
            self.close()
            found = ", ".join(str(version) for version in versions)
            raise StorageError(
                f"{self.shown} holds records of version {found}; this gateway writes version {SCHEMA_VERSION}.",
                remedy="--records with another database, or the version of Chaccu that made it",
            )


def _parse(url: str) -> sql.URL:
    form = "sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME"
    try:
        parsed = sql.make_url(url)
    except (ArgumentError, ValueError) as error:
        raise UsageError("--records names no database.", remedy=form) from error
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg") or not parsed.database or parsed.database == ":memory:":
        raise UsageError(f"{parsed.render_as_string(hide_password=True)} is no database to keep records in.", remedy=form)
    return parsed


def _make_private(file: Path) -> None:
    """Make the database's file for its owner alone, where there is none."""
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE))
    except OSError as error:
        raise StorageError(
            f"conversations cannot be kept in {file}: {error.strerror or error}.",
            remedy="--records sqlite:///FILE in a folder that you may write to",
        ) from error


def _row(record: Record) -> dict[str, str | None]:
    line = record.line
    return {
        "id": _plain(line.id),
        "time": line.time,
        "model": _plain(line.model),
        "finish_reason": None if line.finish_reason is None else _plain(line.finish_reason),
        "line": record.data.decode(),
    }


def _plain(text: str) -> str:
    """PostgreSQL takes no NUL in a text; the line, which is JSON, has none."""
    return text.replace("\x00", "\ufffd")


def _is_outage(error: SQLAlchemyError) -> bool:
    return isinstance(error, (OperationalError, InterfaceError)) or getattr(error, "connection_invalidated", False)


def _explain(error: SQLAlchemyError) -> str:
    """What may be told of an error while writing: a database quotes the values that it refuses, an outage has none."""
    return _first_line(error) if _is_outage(error) else type(getattr(error, "orig", None) or error).__name__


def _first_line(error: SQLAlchemyError) -> str:
    said = str(getattr(error, "orig", None) or error).strip()
    return said.splitlines()[0].rstrip(".") if said else type(error).__name__
