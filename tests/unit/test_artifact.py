from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu import artifact
from chaccu.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_file,
    atomic_folder,
    library_versions,
    manifest_sha256,
    read_manifest,
    require_free_space,
    sha256_file,
    sha256_json,
    storage_errors,
    verify_files,
    write_json,
    write_manifest,
)
from chaccu.errors import ArtifactError, StorageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.bin"
    with atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_interrupted_file_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_file(path) as file:  # noqa: PT012 (the block is what is tested)
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in ("one", "two"):
        with atomic_folder(path) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / f"{text}.txt").write_text(text)
            assert not (path / "sub" / f"{text}.txt").exists()
        assert names(path / "sub") == [f"{text}.txt"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_folder_leaves_what_was_there(tmp_path: Path, before: bool) -> None:
    path = tmp_path / "out"
    if before:
        path.mkdir()
        (path / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="no"), atomic_folder(path) as folder:  # noqa: PT012 (the block is what is tested)
        (folder / "half.txt").write_text("half")
        raise ValueError("no")
    assert names(tmp_path) == (["out"] if before else [])
    assert not before or names(path) == ["old.txt"]


def test_leftovers_of_a_killed_writer_are_removed_by_the_next(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from chaccu.artifact import atomic_file, atomic_folder
with atomic_folder(Path({str(tmp_path / "out")!r})) as folder, atomic_file(Path({str(tmp_path / "a.bin")!r})) as file:
    (folder / "half.txt").write_text("half")
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    assert all(name.startswith(".") for name in names(tmp_path))
    write_json(tmp_path / "a.bin", 1)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole.txt").write_text("whole")
    assert names(tmp_path) == ["a.bin", "out"]


def test_leftovers_are_found_for_a_name_with_brackets(tmp_path: Path) -> None:
    (tmp_path / ".run[1].json.tmp-old-4194305").write_text("left")
    write_json(tmp_path / "run[1].json", 1)
    write_json(tmp_path / "run[1].json", 2)
    assert names(tmp_path) == ["run[1].json"]


def test_a_living_writer_keeps_its_temporary_name(tmp_path: Path) -> None:
    living = tmp_path / f".a.bin.tmp-{os.getppid()}"
    living.write_bytes(b"in work")
    other = tmp_path / ".ab.bin.tmp-1234567"
    other.write_bytes(b"of another artifact")
    write_json(tmp_path / "a.bin", 1)
    assert living.read_bytes() == b"in work"
    assert other.exists()


def test_a_swap_that_was_killed_between_its_two_renames_keeps_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old.txt").write_text("old")
    code = f"""
import os, signal
from pathlib import Path
from chaccu.artifact import atomic_folder
rename = Path.rename
def rename_then_die(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename_then_die
with atomic_folder(Path({str(path)!r})) as folder:
    (folder / "new.txt").write_text("new")
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    # Whatever the moment, a later writer that fails must not be the end of the last whole version.
    with pytest.raises(ValueError, match="no"), atomic_folder(path):
        raise ValueError("no")
    assert names(tmp_path) == ["out"]
    assert names(path) == ["old.txt"]


def test_a_swap_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    with atomic_folder(path) as folder:
        (folder / "old.txt").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.tmp-") and "old" not in self.name:
            raise PermissionError(errno.EACCES, "no", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="no permission"):
        _fill(path)
    assert names(tmp_path) == ["out"]
    assert names(path) == ["old.txt"]


def test_a_full_disk_is_one_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact.os, "fsync", full)
    for attempt in (lambda: write_json(tmp_path / "a.json", 1), lambda: _fill(tmp_path / "out")):
        with pytest.raises(StorageError, match=r"no space left while writing .*MB free") as caught:
            attempt()
        assert "free some space" in caught.value.remedy
        assert names(tmp_path) == []


def _fill(path: Path) -> None:
    with atomic_folder(path) as folder:
        (folder / "a.txt").write_text("a")


def test_too_little_space_is_said_beforehand(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet", 1, "this")
    with pytest.raises(StorageError, match=r"a large model needs 1,000,000,000,000 MB in .*, and [\d,]+ MB are free"):
        require_free_space(tmp_path, 10**18, "a large model")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileNotFoundError(errno.ENOENT, "no", "/x/y"), "there is no file or folder /x/y"),
        (PermissionError(errno.EACCES, "no", "/x/y"), "no permission for /x/y"),
        (OSError(errno.EDQUOT, "quota"), "no space left"),
        (OSError(errno.EIO, "Input/output error"), "cannot use .*: Input/output error"),
    ],
)
def test_the_operating_systems_errors_say_what_to_do(tmp_path: Path, error: OSError, says: str) -> None:
    with pytest.raises(StorageError, match=says), storage_errors(tmp_path / "file"):
        raise error


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        write_json(tmp_path / "file" / "a.json", 1)


def _make(folder: Path, **fields: Any) -> Manifest:
    folder.mkdir(exist_ok=True)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "w.bin").write_bytes(b"weights")
    return write_manifest(folder, Manifest(kind="model", name="m", **fields))


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = _make(
        tmp_path / "m", chat_format="chatml", parents={"base": "ab"}, settings={"lr": 0.1}, facts={"losses": [1.0, 0.5]}
    )
    assert read_manifest(tmp_path / "m") == written
    assert list(written.files) == ["sub/w.bin"]
    assert written.files["sub/w.bin"].size_bytes == 7
    assert written.files["sub/w.bin"].sha256 == sha256_file(tmp_path / "m" / "sub" / "w.bin")
    verify_files(tmp_path / "m", written.files)
    assert read_manifest(tmp_path / "m", kind=("adapter", "model")) == written


def test_equal_artifacts_have_equal_manifests(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _make(tmp_path / name, versions=library_versions("msgspec", "no-such-library"))
    assert manifest_sha256(tmp_path / "one") == manifest_sha256(tmp_path / "two")
    _make(tmp_path / "two", facts={"loss": 1})
    assert manifest_sha256(tmp_path / "one") != manifest_sha256(tmp_path / "two")


def test_unknown_keys_of_a_newer_version_are_ignored(tmp_path: Path) -> None:
    written = _make(tmp_path / "m")
    newer = {**msgspec.to_builtins(written), "novelty": 1}
    write_json(tmp_path / "m" / MANIFEST_NAME, newer)
    assert read_manifest(tmp_path / "m") == written


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    written = _make(folder)
    for data in (b"weightz", b"weight"):
        (folder / "sub" / "w.bin").write_bytes(data)
        with pytest.raises(ArtifactError, match=r"w\.bin is damaged"):
            verify_files(folder, written.files)
    (folder / "sub" / "w.bin").unlink()
    with pytest.raises(ArtifactError, match=r"w\.bin is missing"):
        verify_files(folder, written.files)
    (folder / MANIFEST_NAME).write_text('{"kind": "model"')
    with pytest.raises(ArtifactError, match="is damaged"):
        read_manifest(folder)


def test_no_artifact_or_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no artifact"):
        read_manifest(tmp_path)
    _make(tmp_path / "m")
    with pytest.raises(ArtifactError, match="kind 'model'; expected 'base' or 'gguf'"):
        read_manifest(tmp_path / "m", kind=("base", "gguf"))


def test_json_keys_have_one_hash_in_any_order() -> None:
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
