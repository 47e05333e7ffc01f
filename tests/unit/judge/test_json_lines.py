"""Files of JSON lines: whole, growing, cut off, on a full disk."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.errors import DataError, StorageError
from chaccu.judge.json_lines import JsonLinesLog, read_json_lines, write_json_lines


class Item(msgspec.Struct):
    name: str


def read(file: Path, *, grows: bool = True) -> list[str]:
    return [one.name for one in read_json_lines(file, Item, "item", grows=grows)]


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"", []),
        (b'{"name": "a"}\n{"name": "b"}\n', ["a", "b"]),
        (b'{"name": "a"}\r\n{"name": "\xc3\xbc"}\r\n', ["a", "ü"]),
        # Without the last end of line, as editors leave it; cut off, as a kill leaves it, within a letter too.
        (b'{"name": "a"}\n{"name": "b"}', ["a", "b"]),
        (b'{"name": "a"}\n{"name": "b"', ["a"]),
        (b'{"name": "a"}\n{"name": "\xc3', ["a"]),
    ],
)
def test_whole_lines_are_read(tmp_path: Path, data: bytes, names: list[str]) -> None:
    (tmp_path / "f").write_bytes(data)
    assert read(tmp_path / "f") == names


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1}\n',
        b'{"name": 1}',
        b'{"name": "\xff"}\n',
        b'{"name": "a"}\n\n',
        b'{"name\n{"name": "a"}\n',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(DataError, match=r"line [12] of .* is no item"):
        read(tmp_path / "f")


def test_half_a_line_of_a_file_that_was_written_whole_is_damage(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b'{"name": "a"}\n{"name"')
    with pytest.raises(DataError, match=r"line 2 of .* is no item"):
        read(tmp_path / "f", grows=False)


def test_a_log_grows_behind_what_it_begins_with(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b'{"name": "old"')
    with JsonLinesLog(tmp_path / "f", [Item("a")]) as log:
        log.append([Item("b"), Item("c")])
        assert read(tmp_path / "f") == ["a", "b", "c"]
    assert read(tmp_path / "f") == ["a", "b", "c"]


def test_after_a_full_disk_no_half_of_a_line_stays(tmp_path: Path) -> None:
    class Full:
        """A file whose disk takes four more bytes."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 4

        def write(self, data: memoryview) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= 4
            return int(self.file.write(data[:4]))

        def fileno(self) -> int:
            return int(self.file.fileno())

    with JsonLinesLog(tmp_path / "f", [Item("a")]) as log:
        whole = log._out
        log._out = Full(whole)  # type: ignore[assignment]
        with pytest.raises(StorageError, match="no space left"):
            log.append([Item("b")])
        assert (tmp_path / "f").read_bytes() == b'{"name":"a"}\n'
        log._out = whole
        log.append([Item("c")])
    assert read(tmp_path / "f") == ["a", "c"]


def test_a_file_is_written_anew(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "f", [Item("a")])
    write_json_lines(tmp_path / "f", [])
    assert (tmp_path / "f").read_bytes() == b""
