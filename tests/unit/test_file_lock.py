"""Locks between processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chaccu.artifact import Manifest, write_manifest
from chaccu.errors import StorageError
from chaccu.file_lock import lock_file, lock_folder

_HOLD = """
import sys, time
from pathlib import Path
from chaccu.file_lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "out"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=r"another run writes to .*out now"), lock_folder(folder):
            pass
        process.kill()
    with lock_folder(folder):
        pass


def test_a_lock_ends_with_its_block_and_is_no_part_of_an_artifact(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_folder(tmp_path):
            (tmp_path / "a").write_bytes(b"a")
    assert list(write_manifest(tmp_path, Manifest(kind="answers", name="x")).files) == ["a"]


def test_a_place_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"), lock_folder(tmp_path / "file"):
        pass
    with pytest.raises(StorageError, match="file"), lock_file(tmp_path / "file" / ".lock"):
        pass
