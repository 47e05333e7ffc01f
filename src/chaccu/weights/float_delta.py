"""Deltas of the older form: a model's folder without a manifest whose tensors are target − base in float16, as Vicuna's v0 and
v1.1 were released (FastChat, 2023). The target is base + delta, each rounded to the delta's dtype.

Rows that the base does not have are the target's own (v0 has 32,001 over 32,000). Such a delta says nothing of its base: shapes
are all that can be checked. Buffers of rotary frequencies, which old checkpoints hold and no model reads, are left out.
"""

from __future__ import annotations

import re
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import torch

from chaccu.artifact import Manifest, atomic_folder, copy_files, library_versions, sha256_json, write_manifest
from chaccu.errors import WeightsError
from chaccu.weights.checkpoint import MAX_SHARD_BYTES, Checkpoint, Progress, keep_shards, require_finite, write_checkpoint
from chaccu.weights.model_files import MODEL_FILES, describe_source
from chaccu.weights.pickled_shards import open_pickled
from chaccu.weights.safetensors_file import TensorSpec
from chaccu.weights.tensor_stream import TensorReader, read_together

_FREQUENCIES = re.compile(r".*\.rotary_emb\.inv_freq")


def apply_float_delta(
    base: Path, delta: Path, out: Path, *, max_shard_bytes: int | None = None, progress: Progress | None = None
) -> Manifest:
    """Write `base` + `delta` as a folder with the delta's tokenizer and config, in the delta's shards where these
    are safetensors, unless told otherwise.

    `progress(done, total)` counts bytes. Raises `WeightsError` when the two do not fit together, or a value is not finite,
    `StorageError` when the disk is full.
    """
    before, change = _open(base), _open(delta)
    _check_fits(before, change)
    specs = [
        TensorSpec(name, entry.dtype, entry.shape) for name, entry in change.entries.items() if not _FREQUENCIES.fullmatch(name)
    ]
    sources = {role: describe_source(folder, None, role) for role, folder in (("base", base), ("delta", delta))}
    hashes: dict[str, dict[str, str]] = {"base": {}, "delta": {}}
    with atomic_folder(out) as folder, ThreadPoolExecutor(2) as executor:

        def add(name: str) -> torch.Tensor:
            result, hashes["base"][name], hashes["delta"][name] = _add(before, change, name, executor)
            return result

        if not _is_safe(delta):
            max_shard_bytes = max_shard_bytes or MAX_SHARD_BYTES
        shards = keep_shards(change, specs, max_shard_bytes)
        written = write_checkpoint(folder, specs, add, shards=shards, progress=progress)
        copy_files(delta, folder, MODEL_FILES)
        manifest = Manifest(
            kind="model",
            name=out.name,
            tokenizer_sha256=sources["delta"].tokenizer_sha256,
            license=sources["base"].license,
            parents=sources["base"].parents,
            inputs={f"{role} (tensors)": sha256_json(found) for role, found in hashes.items()},
            facts={"tensors": len(specs)},
            versions=library_versions("torch"),
        )
        return write_manifest(folder, manifest, hashed=written)


def _open(folder: Path) -> Checkpoint:
    """In safetensors or, as these deltas and their bases were released, pickled."""
    return Checkpoint(folder) if _is_safe(folder) else open_pickled(folder)


def _is_safe(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _check_fits(before: Checkpoint, change: Checkpoint) -> None:
    for name in {**change.entries, **before.entries}:
        old, new = before.entries.get(name), change.entries.get(name)
        if _FREQUENCIES.fullmatch(name):
            continue
        if new is not None and not new.dtype.is_floating_point:
            raise WeightsError(
                f"{change.folder} has no manifest.json, and {name} in it is {new.dtype}: it is no delta of floats.",
                remedy="fetch the delta with all its files",
            )
        fits = (
            old is not None
            and new is not None
            and old.dtype.is_floating_point
            and len(old.shape) == len(new.shape)
            and old.shape[1:] == new.shape[1:]
            and old.shape[:1] <= new.shape[:1]
        )
        if not fits:
            shapes = [" × ".join(map(str, entry.shape)) if entry else "not there" for entry in (new, old)]
            raise WeightsError(
                f"{change.folder} is no delta of {before.folder}: {name} is {shapes[0]} in the one, {shapes[1]} in the other.",
                remedy="name the base that the delta was made from, in Hugging Face's form",
            )


def _add(before: Checkpoint, change: Checkpoint, name: str, executor: Executor) -> tuple[torch.Tensor, str, str]:
    """One tensor of the target; SHA-256 of the base's and of the delta's."""
    entry = change.entries[name]
    result = torch.empty(entry.shape, dtype=entry.dtype)
    flat = result.view(-1)
    readers = [TensorReader(before, name), TensorReader(change, name)]
    for start, (old, difference) in read_together(readers, executor):
        difference[: len(old)] += old.to(entry.dtype)
        require_finite(difference, name, change.folder)
        flat[start : start + len(difference)] = difference
    return result, readers[0].sha256, readers[1].sha256
