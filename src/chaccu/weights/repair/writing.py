"""A draft, carried out: in the folder itself, or as a mended copy.

In the folder each file is replaced whole. JSON comes first, each change of which holds by itself; then the weights, under
names that nothing refers to until the new index, or the one file's new name, is in place; what they replace goes last. So a
reader finds a whole model at every moment, and a mending that was stopped is begun again. The manifest, where there is one,
is written at the end; one that was left behind is a fault of its own.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch

from chaccu.artifact import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    atomic_file,
    atomic_folder,
    library_versions,
    manifest_sha256,
    read_manifest,
    require_free_space,
    sha256_file,
    storage_errors,
    sync_folder,
    write_json,
    write_manifest,
)
from chaccu.conversation import TextTokenizer
from chaccu.errors import ArtifactError, UsageError
from chaccu.weights.checkpoint import (
    INDEX_NAME,
    MAX_SHARD_BYTES,
    SINGLE_NAME,
    Progress,
    read_index,
    require_finite,
    write_checkpoint,
)
from chaccu.weights.pickled_shards import PICKLED_INDEX_NAME
from chaccu.weights.repair.draft import JSON_FILES, TEMPLATE, TOKENIZER, Draft, Finding
from chaccu.weights.repair.weights_faults import REPLACED, STAGED, build_index, needs_index
from chaccu.weights.safetensors_file import TensorSpec

BACKUP = ".orig"
_BLOCK_BYTES = 8_000_000
_BLOCK_ROWS = 4096
# Larger files are compared by size: reading a model to look at it would take minutes.
_HASHED_BYTES = 50_000_000


def mend_folder(draft: Draft, *, backup: bool = True, progress: Progress | None = None) -> None:
    """Carry `draft` out in its folder. `backup`: keep the originals of JSON files and templates as NAME.orig, the first ones
    where there are several. `progress(done, total)` counts bytes of weights.

    Raises `WeightsError` for weights that are not finite, `StorageError` when the disk is full, `UsageError` for rows to be
    added: weights and config would then have to change in one moment.
    """
    folder = draft.folder
    if draft.grown_rows is not None:
        raise UsageError("rows are added to an embedding in a copy alone.", remedy="--out DIR instead of --write")
    with storage_errors(folder):
        for name, text in draft.contents.items():
            if name != INDEX_NAME or not draft.rewriting:
                _keep_original(folder / name, backup)
                _write_text(folder / name, text)
        written = _replace_weights(draft, backup, progress) if draft.rewriting else {}
        for name in draft.removed:
            if name in JSON_FILES:
                _keep_original(folder / name, backup)
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder / STAGED, ignore_errors=True)
    if (parent := _read_parent(folder)) is not None:
        changed = {*draft.contents, *draft.removed, *draft.stale, *written, INDEX_NAME}
        known = {name: entry for name, entry in parent.files.items() if name not in changed}
        write_manifest(folder, _describe(draft, folder, parent), hashed={**known, **written})


def mend_copy(draft: Draft, out: Path, *, progress: Progress | None = None) -> Manifest:
    """Write the folder of `draft`, mended, to `out`, with a manifest; the folder itself stays as it is.

    Raises as `mend_folder`, and `UsageError` when `out` is the folder itself, lies in it, or holds something else.
    """
    source = draft.folder.resolve()
    if out.resolve() == source or source in out.resolve().parents:
        raise UsageError(f"--out {out} is the folder that is mended, or in it.", remedy="name another, or --write")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_NAME).is_file())):
        raise UsageError(f"--out {out} is there and is no artifact.", remedy="name a folder that is not there")
    copied = list(_list_copied(draft))
    total = sum(path.stat().st_size for path in copied) + (
        sum(spec.size_bytes for spec in _plan(draft)) if draft.rewriting else 0
    )
    require_free_space(out.parent, total + _BLOCK_BYTES, "the mended model")
    with atomic_folder(out) as folder, ThreadPoolExecutor(1) as pool:
        old = [file.path for file in draft.weights.files] if draft.weights else []
        # Weights that are carried over are hashed on their way.
        inputs = {path.name: pool.submit(sha256_file, path) for path in old} if draft.rewriting else {}
        written: dict[str, FileEntry] = {}
        done = 0
        for path in copied:
            target = folder / path.relative_to(draft.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            written[target.relative_to(folder).as_posix()] = _copy_hashed(path, target)
            done += path.stat().st_size
            if progress:
                progress(done, total)
        for name, text in draft.contents.items():
            if name != INDEX_NAME or not draft.rewriting:
                (folder / name).write_text(text, encoding="utf-8", newline="")
        if draft.rewriting:
            try:
                written |= _write_weights(draft, folder, lambda more, _: progress(done + more, total) if progress else None)
            except BaseException:
                for future in inputs.values():
                    future.cancel()
                raise
        parent = _read_parent(draft.folder)
        known = {path.name: written[path.name].sha256 for path in old if path.name in written}
        manifest = msgspec.structs.replace(
            _describe(draft, folder, parent or Manifest(kind="base", name=out.name)),
            parents={"source": manifest_sha256(draft.folder)} if parent else {},
            inputs={**{name: future.result() for name, future in inputs.items()}, **({} if inputs else known)},
            versions=library_versions("torch", "tokenizers"),
        )
        return write_manifest(folder, manifest, hashed=written)


def find_stale_manifest(draft: Draft) -> Iterator[Finding]:
    """A manifest of other files than are there: someone changed them, or a mending was stopped before its end."""
    if not (draft.folder / MANIFEST_NAME).is_file():
        return
    try:
        manifest = read_manifest(draft.folder)
    except ArtifactError as error:
        yield Finding(MANIFEST_NAME, error.message.rstrip("."), "take it away: the model loads without", mendable=False)
        return
    for name, entry in manifest.files.items():
        path = draft.folder / name
        if not path.is_file() or path.stat().st_size != entry.size_bytes or not _is_unchanged(path, entry):
            draft.stale.add(name)
    if draft.stale:
        first, more = min(draft.stale), len(draft.stale) - 1
        yield Finding(
            MANIFEST_NAME,
            f"is not of the {first} that is here{f', nor of {more} more' if more else ''}",
            "lists the files anew",
        )


def _is_unchanged(path: Path, entry: FileEntry) -> bool:
    is_large = entry.size_bytes > _HASHED_BYTES or path.suffix == ".safetensors"
    return is_large or sha256_file(path) == entry.sha256


def _read_parent(folder: Path) -> Manifest | None:
    """The folder's manifest; None where there is none, or a damaged one, which is a finding."""
    try:
        return read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    except ArtifactError:
        return None


def _describe(draft: Draft, folder: Path, parent: Manifest) -> Manifest:
    """The manifest of the mended model in `folder`."""
    sha256 = TextTokenizer.load(folder).sha256 if (folder / TOKENIZER).is_file() else parent.tokenizer_sha256
    faults = sorted({finding.fault for finding in draft.findings if finding.mendable})
    return msgspec.structs.replace(
        parent,
        chat_format=draft.options.chat_format if TEMPLATE in draft.contents else parent.chat_format,
        tokenizer_sha256=sha256,
        settings={**parent.settings, "repaired": sorted({*parent.settings.get("repaired", ()), *faults})},
    )


def _list_copied(draft: Draft) -> Iterator[Path]:
    """Files that a copy takes over as they are."""
    left = {*draft.contents, *draft.removed, MANIFEST_NAME}
    if draft.weights:
        # They are written as safetensors now, or are there as such already.
        left |= {PICKLED_INDEX_NAME, *(path.name for path in draft.folder.glob("pytorch_model*.bin"))}
    if draft.weights and draft.rewriting:
        left |= {INDEX_NAME, *(file.path.name for file in draft.weights.files)}
    for path in sorted(draft.folder.rglob("*")):
        name = path.relative_to(draft.folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and name.as_posix() not in left and path.suffix != BACKUP:
            yield path


def _copy_hashed(source: Path, target: Path) -> FileEntry:
    """Copy a file in blocks, and hash it on the way."""
    digest, size = hashlib.sha256(), 0
    with storage_errors(target), source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            digest.update(block)
            writer.write(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _keep_original(path: Path, backup: bool) -> None:
    original = path.with_name(path.name + BACKUP)
    if backup and path.is_file() and not original.exists():
        with atomic_file(original) as file:
            file.write(path.read_bytes())


def _plan(draft: Draft) -> list[TensorSpec]:
    """The tensors as they will be written."""
    assert draft.weights is not None
    grown = _grown_names(draft)
    specs = [spec for name, spec in draft.weights.entries.items() if name not in draft.left_out]
    return [
        TensorSpec(spec.name, spec.dtype, (draft.grown_rows or 0, *spec.shape[1:]) if spec.name in grown else spec.shape)
        for spec in specs
    ]


def _grown_names(draft: Draft) -> set[str]:
    ends = (draft.find_embedding(), draft.find_head()) if draft.grown_rows is not None else ()
    return {spec.name for spec in ends if spec is not None}


def _write_weights(draft: Draft, folder: Path, progress: Progress | None) -> dict[str, FileEntry]:
    weights = draft.weights
    assert weights is not None
    grown = _grown_names(draft)
    is_single = [file.path.name for file in weights.files] == [SINGLE_NAME]

    def read(name: str) -> torch.Tensor:
        tensor = weights.read(name)
        require_finite(tensor, name, draft.folder)
        return _grow(tensor, draft.grown_rows) if name in grown and draft.grown_rows else tensor

    specs = _plan(draft)
    # What is one file stays one: its name is all that refers to it.
    limit = sum(spec.size_bytes for spec in specs) if is_single else MAX_SHARD_BYTES
    return write_checkpoint(folder, specs, read, max_shard_bytes=limit, progress=progress)


def _grow(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """With rows added that are each the mean of the old ones: a token that says nothing in particular."""
    total = torch.zeros(tensor.shape[1], dtype=torch.float64)
    for begin in range(0, len(tensor), _BLOCK_ROWS):
        total += tensor[begin : begin + _BLOCK_ROWS].sum(0, dtype=torch.float64)
    added = (total / len(tensor)).to(tensor.dtype).expand(rows - len(tensor), -1)
    return torch.cat([tensor, added])


def _replace_weights(draft: Draft, backup: bool, progress: Progress | None) -> dict[str, FileEntry]:
    """Write the weights beside the old ones, put them in their place, take the old ones away."""
    folder, weights = draft.folder, draft.weights
    assert weights is not None
    old = [file.path.name for file in weights.files]
    with atomic_folder(folder / STAGED) as staged:
        written = _write_weights(draft, staged, progress)
        # For the next mending, should this one end here.
        write_json(staged / REPLACED, old)
    names = _free_names(list(written), old)
    for name, new in names.items():
        (folder / STAGED / name).replace(folder / new)
    sync_folder(folder)
    index = read_index(folder / STAGED)
    places = (
        {name: names[place] for name, place in index.items()}
        if index is not None
        else {spec.name: names[next(iter(names))] for spec in _plan(draft)}
    )
    _keep_original(folder / INDEX_NAME, backup)
    if needs_index(folder, names.values()):
        write_json(folder / INDEX_NAME, build_index({spec.name: spec for spec in _plan(draft)}, places))
    for name in {*old} - {*names.values()}:
        (folder / name).unlink(missing_ok=True)
    if not needs_index(folder, names.values()):
        (folder / INDEX_NAME).unlink(missing_ok=True)
    return {names[name]: entry for name, entry in written.items()}


def _free_names(names: list[str], old: list[str]) -> dict[str, str]:
    """Final names by those written. Only a whole model in one file takes the place of another."""
    if old == [SINGLE_NAME] or not {*names} & {*old}:
        return {name: name for name in names}
    return {name: name.replace("model-", "model-mended-", 1) for name in names}
