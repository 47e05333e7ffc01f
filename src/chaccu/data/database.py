"""The records of Chaccu's gateway in a database (`--records`) as JSON lines, so that its rows are records like any other.

Invariants: rows come in the order in which they were written, a few at a time, however many there are, and gateways write
meanwhile; what they add while a run reads is left to the next run; a database of another layout raises one `DataError`. Nothing
is written. No password gets into a name or an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaccu.errors import DataError, MissingDependencyError, StorageError

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

_SCHEMES = ("sqlite:", "postgresql:", "postgresql+psycopg:")
# The layout that this reads, as the gateway writes it.
_VERSION = 1
_ROWS = 200
_NEXT_ROWS = "SELECT number, line FROM chaccu_answers WHERE number > :after AND number <= :last ORDER BY number LIMIT :rows"
_CONNECT_S = 10


def is_database(argument: str) -> bool:
    """Whether a SRC argument is the URL of a database."""
    return argument.startswith(_SCHEMES)


def measure_database(url: str) -> tuple[str, int, int]:
    """The URL without its password, how many characters its lines have, and the number of the last one.

    Raises `DataError` for a database that cannot be read or has no records, `StorageError` for a file that is not there,
    `MissingDependencyError` without the database's libraries.
    """
    stream = DatabaseStream(url)
    try:
        return stream.origin, stream.size, stream.last
    finally:
        stream.close()


class DatabaseStream:
    """The lines of the database at `url`, up to the one with number `last`. `share_read`, from 0 to 1, is how far they have
    been read. Raises as `measure_database` does.
    """

    def __init__(self, url: str, last: int | None = None) -> None:
        try:
            import sqlalchemy as sql
            from sqlalchemy.exc import ArgumentError, SQLAlchemyError
        except ModuleNotFoundError as error:
            raise MissingDependencyError("SQLAlchemy", extra="records", needed_for=url.partition(":")[0]) from error
        self.damage_errors: tuple[type[BaseException], ...] = (SQLAlchemyError,)
        try:
            parsed = sql.make_url(url)
        except (ArgumentError, ValueError) as error:
            raise DataError("a source names no database.", remedy="sqlite:///FILE or postgresql+psycopg://…") from error
        self.origin = parsed.render_as_string(hide_password=True)
        try:
            self._engine = _open(parsed)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(error.name or "a driver", extra="records", needed_for=self.origin) from error
        try:
            self._check_version()
            if last is None:
                last = self._ask("SELECT MAX(number) FROM chaccu_answers")[0][0]
            if last is None:
                raise DataError(f"{self.origin} holds no record.", remedy="chaccu gateway --records writes some")
            self.last: int = last
            measured = self._ask("SELECT SUM(LENGTH(line)) FROM chaccu_answers WHERE number <= :last", last=last)
            self.size = int(measured[0][0])
        except SQLAlchemyError as error:
            said = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise DataError(
                f"{self.origin} cannot be read: {said}.", remedy="name a database that chaccu gateway --records writes"
            ) from error
        self._read = self._after = 0
        self._buffer = memoryview(b"")

    @property
    def share_read(self) -> float:
        return min(self._read / self.size, 1.0)

    def read1(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end."""
        if not self._buffer:
            rows = self._ask(_NEXT_ROWS, after=self._after, last=self.last, rows=_ROWS)
            if not rows:
                return b""
            self._after = rows[-1][0]
            self._read += sum(len(line) for _, line in rows)
            self._buffer = memoryview("".join(f"{line}\n" for _, line in rows).encode())
        piece = bytes(self._buffer[:size])
        self._buffer = self._buffer[size:]
        return piece

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _check_version(self) -> None:
        versions = [version for (version,) in self._ask("SELECT version FROM chaccu_schema")]
        if versions != [_VERSION]:
            found = ", ".join(map(str, versions)) or "none"
            raise DataError(
                f"{self.origin} holds records of version {found}; version {_VERSION} is read.",
                remedy="use the version of Chaccu that wrote it",
            )

    def _ask(self, statement: str, **values: int) -> Sequence[Any]:
        """All rows that a statement finds, in a transaction that ends with it: an SQLite file that is being read takes no
        records meanwhile.
        """
        import sqlalchemy as sql

        with self._engine.connect() as connection:
            return connection.execute(sql.text(statement), values).fetchall()


def _open(url: URL) -> Engine:
    import sqlalchemy as sql
    from sqlalchemy.pool import NullPool

    if url.get_backend_name() == "sqlite":
        # The library would make a file that is not there.
        if not url.database or not Path(url.database).is_file():
            raise StorageError(f"there is no file {url.database}.", remedy="check the path for a typing error")
        return sql.create_engine(url, poolclass=NullPool)
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    return sql.create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": _CONNECT_S})
