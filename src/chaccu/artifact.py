"""Artifacts: files that appear whole or not at all, and the manifest that says what they are.

Invariants: a file or folder written through this module is either complete under its final name or absent; whatever
interrupts the writing (an exception, a full disk, SIGKILL) leaves at most a `.tmp-` name beside it, which the next write of
the same artifact removes. A manifest carries no time and no machine name, so equal inputs give equal bytes.

This module ignores what the artifacts mean; the rooms that make them know.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import msgspec

from chaccu.errors import ArtifactError, StorageError, UsageError

MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"
_TEMPORARY = ".tmp-"
_OLD = "old-"


class FileEntry(msgspec.Struct, frozen=True):
    """One file of an artifact: size in bytes and SHA-256 in hex."""

    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an artifact is and where it came from.

    `kind`: "base", "dataset", "adapter", "model", "gguf", "delta", "answers" or "verdicts". `parents`: the manifests' own
    SHA-256 by role ("base", "adapter", "dataset"). `inputs`: SHA-256 of raw inputs by name. `settings`: the resolved
    configuration that made it. `facts`: what the making measured (losses, counts). Unknown keys of a newer version are ignored
    on reading.
    """

    kind: str
    name: str
    chat_format: str | None = None
    tokenizer_sha256: str | None = None
    license: str | None = None
    parents: dict[str, str] = {}
    inputs: dict[str, str] = {}
    settings: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    versions: dict[str, str] = {}
    files: dict[str, FileEntry] = {}


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises `StorageError` if it cannot be read."""
    with storage_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys), in hex: the key of content-addressed steps."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def refuse_to_replace(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raise `UsageError` where a file to write is one of those that are read, by whatever name."""
    read = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in read:
            raise UsageError(f"{path} is read, and would be replaced by what is made of it.", remedy="write to another file")


def copy_files(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that `source` has into `folder`."""
    for name in names:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def library_versions(*names: str) -> dict[str, str]:
    """Installed versions of `names` (those absent are left out), with Chaccu's and Python's own."""
    found = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for name in ("chaccu", *names):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors on `path` into `StorageError`s that say what to do."""
    try:
        yield
    except OSError as error:
        raise _explain(error, path) from error


def _explain(error: OSError, path: Path) -> StorageError:
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = path if path.is_dir() else path.parent
        free = _free_bytes(folder)
        return StorageError(
            f"no space left while writing {path} ({free / 1e6:,.0f} MB free in {folder}); nothing half-written was kept.",
            remedy="free some space or choose another folder, then run the same command again",
        )
    if isinstance(error, FileNotFoundError):
        return StorageError(f"there is no file or folder {path}.", remedy="check the path for a typing error")
    if isinstance(error, PermissionError):
        return StorageError(f"no permission for {path}.", remedy="choose a folder you may write to, or change its owner")
    return StorageError(f"cannot use {path}: {error.strerror or error}.")


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise `StorageError` unless the disk that holds `folder` has `needed_bytes` left for `what`."""
    with storage_errors(folder):
        free = _free_bytes(folder.absolute())
    if free < needed_bytes:
        raise StorageError(
            f"{what} needs {needed_bytes / 1e6:,.0f} MB in {folder}, and {free / 1e6:,.0f} MB are free.",
            remedy="free some space or choose another folder",
        )


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` only once the block has ended without an error.

    Raises `StorageError` when the disk is full or the folder cannot be written.
    """
    temporary = _temporary_name(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder filled under a temporary name, which replaces `path` once the block has ended without an error.

    Raises `StorageError` when the disk is full or the folder cannot be written.
    """
    temporary = _temporary_name(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary.mkdir()
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    _sync_file(file)
            if path.exists():
                old = path.with_name(f".{path.name}{_TEMPORARY}{_OLD}{os.getpid()}")
                path.rename(old)
                try:
                    temporary.rename(path)
                except BaseException:
                    old.rename(path)
                    raise
                shutil.rmtree(old)
            else:
                temporary.rename(path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def describe_files(
    folder: Path, *, without: str | None = None, hashed: Mapping[str, FileEntry] | None = None
) -> dict[str, FileEntry]:
    """Size and hash of every file below `folder` but the manifest and the lock, by relative POSIX path; `without` names a
    folder in it that is no part of the artifact, `hashed` has what was hashed as it was written."""
    found = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (MANIFEST_NAME, LOCK_NAME) and file.relative_to(folder).parts[0] != without
    }
    known = hashed or {}
    return {name: known.get(name) or FileEntry(file.stat().st_size, sha256_file(file)) for name, file in found.items()}


def write_manifest(
    folder: Path, manifest: Manifest, *, without: str | None = None, hashed: Mapping[str, FileEntry] | None = None
) -> Manifest:
    """Write `manifest` into `folder` with its files listed and hashed, see `describe_files`; returns what was written."""
    complete = msgspec.structs.replace(manifest, files=describe_files(folder, without=without, hashed=hashed))
    write_json(folder / MANIFEST_NAME, complete)
    return complete


def read_manifest(folder: Path, *, kind: str | tuple[str, ...] | None = None) -> Manifest:
    """The manifest of an artifact folder.

    Raises `ArtifactError` when it is missing, unreadable or of another kind.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no artifact: it has no {MANIFEST_NAME}.",
            remedy="name the folder that a chaccu command wrote with --out",
        )
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise ArtifactError(f"{path} is damaged: {error}.", remedy="run the command that made this folder again") from error
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds is not None and manifest.kind not in kinds:
        raise ArtifactError(f"{folder} holds an artifact of kind {manifest.kind!r}; expected {' or '.join(map(repr, kinds))}.")
    return manifest


def manifest_sha256(folder: Path) -> str:
    """SHA-256 of the folder's manifest: the identity that children name as parent."""
    return sha256_file(folder / MANIFEST_NAME)


def weights_sha256(manifest: Manifest) -> dict[str, str]:
    """SHA-256 by name of a model's weights, as its manifest lists them, and of the file that a base was unpacked from: equal on
    every machine, while the manifest's own hash takes in the versions of the libraries."""
    weights = {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(".safetensors")}
    return {**manifest.inputs, **weights} if manifest.kind == "base" else weights


def verify_files(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise `ArtifactError` naming the first file whose size or hash is not the manifest's."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing.", remedy="run the command that made this folder again")
        if path.stat().st_size != entry.size_bytes or sha256_file(path) != entry.sha256:
            raise ArtifactError(
                f"{path} is damaged: its SHA-256 is not the one in the manifest.",
                remedy="run the command that made this folder again",
            )


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")


def _remove_leftovers(path: Path) -> None:
    """Remove what earlier, killed writers of `path` left; a living writer's temporary name stays.

    The old folder of a writer that was killed while it put the new one in its place is put back first.
    """
    prefix = f".{path.name}{_TEMPORARY}"
    for leftover in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        owner = leftover.name.rpartition("-")[2]
        if owner.isdigit() and int(owner) != os.getpid() and _is_running(int(owner)):
            continue
        if leftover.name.startswith(prefix + _OLD) and not path.exists():
            leftover.rename(path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk know what the folder's files are called now."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
