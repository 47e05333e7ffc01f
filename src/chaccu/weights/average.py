"""The weighted mean of checkpoints of one model (a soup: Wortsman et al. 2022, arXiv:2203.05482).

Invariants: the mean is taken in float32 (float64 for tensors of that) and rounded once, to the first checkpoint's dtype;
checkpoints whose tensors, settings or tokenizers differ have no mean, and are refused by the first difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import torch

from chaccu.artifact import Manifest, atomic_folder, copy_files, library_versions, sha256_json, write_manifest
from chaccu.errors import UsageError, WeightsError
from chaccu.weights.checkpoint import Checkpoint, Progress, keep_shards, write_checkpoint
from chaccu.weights.model_difference import find_config_difference, find_tokenizer_difference
from chaccu.weights.model_files import MODEL_FILES, describe_source, read_config, require_whole_weights
from chaccu.weights.safetensors_file import TensorSpec
from chaccu.weights.tensor_stream import TensorReader, read_together


def average_models(
    folders: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the mean of two or more models with the first one's tokenizer and config, in its shards unless told otherwise.

    `weights`: one for each, equal ones where None; only their ratios count. `progress(done, total)` counts bytes. Raises
    `UsageError` for other weights, `WeightsError` when the models differ, are damaged or hold values that are not finite,
    `StorageError` when the disk is full.
    """
    shares = _find_shares(len(folders), weights)
    for folder in folders:
        require_whole_weights(folder, read_config(folder))
    checkpoints = [Checkpoint(folder) for folder in folders]
    for other in checkpoints[1:]:
        _check_same(checkpoints[0], other)
    roles = [f"model_{at}" for at in range(1, len(folders) + 1)]
    sources = [describe_source(folder, None, role) for folder, role in zip(folders, roles, strict=True)]
    formats = {source.chat_format for source in sources if source.chat_format}
    if len(formats) > 1:
        raise WeightsError(
            f"the models were trained in other chat formats: {', '.join(sorted(formats))}.", remedy="leave one out"
        )
    specs = [TensorSpec(name, entry.dtype, entry.shape) for name, entry in checkpoints[0].entries.items()]
    hashes: list[dict[str, str]] = [{} for _ in folders]
    with atomic_folder(out) as folder, ThreadPoolExecutor(len(folders)) as executor:

        def take_mean(name: str) -> torch.Tensor:
            mean, found = _average(checkpoints, shares, name, executor)
            for known, sha256 in zip(hashes, found, strict=True):
                known[name] = sha256
            return mean

        shards = keep_shards(checkpoints[0], specs, max_shard_bytes)
        written = write_checkpoint(folder, specs, take_mean, shards=shards, progress=progress)
        copy_files(folders[0], folder, MODEL_FILES)
        manifest = Manifest(
            kind="model",
            name=out.name,
            chat_format=next(iter(formats), None),
            tokenizer_sha256=sources[0].tokenizer_sha256,
            # Bound by the terms of all, as SPDX writes it.
            license=" AND ".join(dict.fromkeys(source.license for source in sources if source.license)) or None,
            parents={role: sha256 for source in sources for role, sha256 in source.parents.items()},
            inputs={f"{role} (tensors)": sha256_json(found) for role, found in zip(roles, hashes, strict=True)},
            settings={"weights": dict(zip(roles, shares, strict=True))},
            versions=library_versions("torch"),
        )
        return write_manifest(folder, manifest, hashed=written)


def _find_shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if count < 2:
        raise UsageError("a mean needs two models or more.", remedy="name their folders one after another")
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise UsageError(
            f"there are {len(given)} weights for {count} models.", remedy="give --weight once for each, in their order"
        )
    odd = next((weight for weight in given if not (math.isfinite(weight) and weight > 0)), None)
    if odd is not None:
        raise UsageError(f"a weight is {odd:g}; it must be more than 0.", remedy="leave out a model that is not to count")
    return [weight / sum(given) for weight in given]


def _check_same(first: Checkpoint, other: Checkpoint) -> None:
    """Raise `WeightsError` by the first difference that leaves no mean."""
    why = (
        _find_tensor_difference(first, other)
        or find_config_difference(read_config(first.folder), read_config(other.folder))
        or find_tokenizer_difference(first.folder, other.folder)
    )
    if why:
        raise WeightsError(
            f"{other.folder} is no checkpoint of the same model as {first.folder}: {why}.",
            remedy="average checkpoints of one run, or of runs from one base",
        )


def _find_tensor_difference(first: Checkpoint, other: Checkpoint) -> str | None:
    for name in {**first.entries, **other.entries}:
        ours, theirs = first.entries.get(name), other.entries.get(name)
        if ours is None or theirs is None:
            return f"{name} is in {(first if ours else other).folder} alone"
        if ours.shape != theirs.shape:
            return f"{name} is {' × '.join(map(str, theirs.shape))} in it, and {' × '.join(map(str, ours.shape))} in the first"
        if not (ours.dtype.is_floating_point and theirs.dtype.is_floating_point):
            return f"{name} is {theirs.dtype} in it and {ours.dtype} in the first, and a mean needs floating-point numbers"
    return None


def _average(
    checkpoints: Sequence[Checkpoint], shares: Sequence[float], name: str, executor: Executor
) -> tuple[torch.Tensor, list[str]]:
    """One tensor's mean, and the SHA-256 of each checkpoint's."""
    entry = checkpoints[0].entries[name]
    result = torch.empty(entry.shape, dtype=entry.dtype)
    flat = result.view(-1)
    readers = [TensorReader(checkpoint, name) for checkpoint in checkpoints]
    for start, pieces in read_together(readers, executor):
        mean = torch.zeros(len(pieces[0]), dtype=_working_dtype(entry.dtype))
        for piece, share in zip(pieces, shares, strict=True):
            mean.add_(piece.to(mean.dtype), alpha=share)
        flat[start : start + len(mean)] = mean
    return result, [reader.sha256 for reader in readers]


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
