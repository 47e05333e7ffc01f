"""SRC arguments to open byte streams: paths, globs, `package:NAME`, `hf:OWNER/NAME[:FILE]`, URLs of databases; gzip, zstd,
zip and parquet told by their first bytes.

Invariants: a source's `origin` is the name the user gave (a path, `package:NAME`, `hf:…`), which the ledger and the manifest
carry; a member of a zip is `ZIP:MEMBER`, and a database's URL is without its password. Nothing is unpacked to disk. A stream
that is cut off or damaged ends where it can no longer be read and says so in `damage`; only a zip or a parquet file without its
table of contents, of which nothing can be read, raises. This module ignores what the bytes mean.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Protocol

import msgspec

from chaccu.artifact import sha256_file, storage_errors
from chaccu.data.archives import is_zip, list_members, open_member
from chaccu.data.database import DatabaseStream, is_database, measure_database
from chaccu.data.hub import download_files
from chaccu.data.tables import PARQUET_MAGIC, TableStream
from chaccu.errors import DataError, MissingDependencyError, StorageError

_PACKAGE = "package:"
_HUB = "hf:"
_PIECE_BYTES = 1 << 14
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Source(msgspec.Struct, frozen=True):
    """One input file, or one `member` of a zip, or the database at `url` up to its `last_row`. `size_bytes` is its size on
    disk, compressed or not; of a database that of its lines."""

    origin: str
    path: Path
    size_bytes: int
    member: str | None = None
    url: str = ""
    last_row: int = 0


def find_sources(arguments: Sequence[str]) -> list[Source]:
    """The files that SRC arguments stand for, in the order given (a glob's matches sorted), each once.

    Raises `StorageError` for a path or pattern that matches nothing, `MissingDependencyError` for a package that is not
    installed, `DataError` for an empty file, a package or a zip without a data file, a data set that cannot be fetched.
    """
    found: dict[str, Source] = {}
    for argument in arguments:
        if is_database(argument):
            origin, size, last = measure_database(argument)
            found.setdefault(origin, Source(origin, Path(origin), size, url=argument, last_row=last))
            continue
        for origin, path in _expand(argument):
            with storage_errors(path):
                size = path.stat().st_size
            if size == 0:
                raise DataError(f"{path} is empty (0 bytes).", remedy="check how the file was made or downloaded")
            if is_zip(path):
                for member in list_members(path, origin):
                    name = f"{origin}:{member.filename}"
                    found.setdefault(name, Source(name, path, member.compress_size, member.filename))
            else:
                found.setdefault(origin, Source(origin, path, size))
    return list(found.values())


def hash_source(source: Source) -> str:
    """SHA-256 of its file, or of a database's lines."""
    if not source.url:
        return sha256_file(source.path)
    hashed = hashlib.sha256()
    with SourceStream(source) as stream:
        while piece := stream.read(_PIECE_BYTES):
            hashed.update(piece)
    if stream.damage:
        raise DataError(f"{source.origin} cannot be read: {stream.damage.splitlines()[0]}.")
    return hashed.hexdigest()


def _expand(argument: str) -> list[tuple[str, Path]]:
    if argument.startswith(_PACKAGE):
        return [(argument, _package_file(argument[len(_PACKAGE) :]))]
    if argument.startswith(_HUB):
        return download_files(argument[len(_HUB) :], argument)
    path = Path(argument)
    if path.is_file():
        return [(argument, path)]
    if path.is_dir():
        raise StorageError(f"{argument} is a folder.", remedy=f"name its files, for example '{argument.rstrip('/')}/*.json'")
    found = glob.glob(argument, recursive=True)  # noqa: PTH207 (an absolute pattern has no folder to begin from)
    matches = [match for match in sorted(found) if Path(match).is_file()]
    if not matches:
        what = "no file matches" if glob.has_magic(argument) else "there is no file"
        raise StorageError(f"{what} {argument}.", remedy="check the path for a typing error")
    return [(match, Path(match)) for match in matches]


def _package_file(name: str) -> Path:
    """The largest *.json or *.jsonl under the data folder of an installed Python package."""
    try:
        folder = resources.files(name.replace("-", "_")) / "data"
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"the Python package {name}", extra="demo", needed_for=f"{_PACKAGE}{name}") from error
    root = Path(str(folder))
    files = sorted(file for file in root.rglob("*") if file.suffix in (".json", ".jsonl")) if root.is_dir() else []
    if not files:
        raise DataError(f"the package {name} ships no *.json or *.jsonl in its data folder.", remedy="name the file itself")
    return max(files, key=lambda file: file.stat().st_size)


class _Readable(Protocol):
    def read1(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class SourceStream:
    """The decompressed bytes of a source; a context manager.

    `position_bytes` is how far the file on disk has been read (for progress); `damage` is "" or says what ended the stream
    early.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._path = source.path
        self.damage = ""

    def __enter__(self) -> SourceStream:
        self._files = ExitStack()
        self._stream: _Readable
        self._damage_errors: tuple[type[BaseException], ...]
        if self._source.url:
            database = DatabaseStream(self._source.url, self._source.last_row)
            self._stream, self._damage_errors = database, database.damage_errors
            self._files.callback(database.close)
            return self
        with storage_errors(self._path):
            self._file = self._files.enter_context(self._path.open("rb"))
            if self._source.member is not None:
                self._stream, self._damage_errors = open_member(self._file, self._source.member, self._source.origin)
                self._files.callback(self._stream.close)
            else:
                magic = self._file.read(4)
                self._file.seek(0)
                self._stream, self._damage_errors = _decompressed(self._source, self._file, magic)
            self._start = self._file.tell()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def position_bytes(self) -> int:
        """Bytes of the file read so far; of a table or a database, its share of rows."""
        if isinstance(self._stream, (TableStream, DatabaseStream)):
            return int(self._source.size_bytes * self._stream.share_read)
        return min(self._file.tell() - self._start, self._source.size_bytes)

    def read(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end. Raises `StorageError` when the disk fails."""
        pieces: list[bytes] = []
        left = size
        with storage_errors(self._path):
            # In small pieces, so that what stands before a damaged place is not lost with it.
            while left > 0 and not self.damage:
                try:
                    piece = self._stream.read1(min(left, _PIECE_BYTES))
                except self._damage_errors as error:
                    self.damage = str(error)
                    break
                if not piece:
                    break
                pieces.append(piece)
                left -= len(piece)
        return b"".join(pieces)


def _decompressed(source: Source, file: io.BufferedReader, magic: bytes) -> tuple[_Readable, tuple[type[BaseException], ...]]:
    """The plain bytes of `file`, and the exceptions by which its compression says that it is damaged."""
    if magic[:2] == _GZIP_MAGIC:
        return gzip.GzipFile(fileobj=file), (EOFError, zlib.error, gzip.BadGzipFile)
    if magic == _ZSTD_MAGIC:
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True), (zstandard.ZstdError,)
    if magic == PARQUET_MAGIC:
        table = TableStream(source.path, source.origin)
        return table, table.damage_errors
    return file, ()
