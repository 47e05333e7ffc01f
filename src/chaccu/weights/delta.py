"""A model as its difference from another, and back, bit for bit.

A difference of floating-point numbers does not undo: base + (target − base), rounded twice, is not always the target. So what
is subtracted are the bit patterns, as unsigned integers of the dtype's width that wrap around, and that is undone by adding.
The base is first rounded to the target's dtype where it has another, which is the same on every machine. Where training has
moved a weight by little its difference is a small number, or, just below zero, one of ones: most high bytes are 0 or 255, and
compress well.

Of a tensor with more rows than the base's (added tokens) the added ones are whole; so are tensors that the base does not have.
The manifest of kind "delta" has for each tensor the SHA-256 of both sides, so that a wrong or damaged base ends the work at its
first tensor; and one of the base's first and last bytes, by which a wrong base is known before the work begins. Files do not
matter: the same tensors in other shards are the same base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import torch

from chaccu.artifact import Manifest, atomic_folder, copy_files, library_versions, read_manifest, write_manifest
from chaccu.errors import WeightsError
from chaccu.weights.checkpoint import Checkpoint, Progress, keep_shards, write_checkpoint
from chaccu.weights.model_files import MODEL_FILES, describe_source
from chaccu.weights.safetensors_file import DTYPE_NAMES, DTYPES, TensorSpec
from chaccu.weights.tensor_stream import TensorReader, bits, read_together

_END_BYTES = 4096
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


class BaseTensor(msgspec.Struct, frozen=True):
    """What a tensor was subtracted from. `ends_sha256`: of its first and last 4 KiB; `sha256`: of all its bytes."""

    dtype: str
    shape: tuple[int, ...]
    ends_sha256: str
    sha256: str


class TargetTensor(msgspec.Struct, frozen=True):
    """What a tensor of a delta becomes. `base` is None for one that is carried whole."""

    dtype: str
    sha256: str
    base: BaseTensor | None = None


class DeltaFacts(msgspec.Struct, frozen=True):
    """What a delta's manifest says of it. `unchanged`: tensors that are the base's own; `dropped`: those that only the base
    has."""

    base_name: str
    tensors: dict[str, TargetTensor]
    unchanged: int
    dropped: list[str]


def make_delta(
    base: Path,
    target: Path,
    out: Path,
    *,
    base_name: str | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write `target` − `base` as a folder with the target's tokenizer and config, in the target's shards unless told otherwise.

    `base_name`: what others know the base by; else what its manifest or its folder is called. `progress(done, total)` counts
    bytes. Raises `WeightsError` when weights are damaged, not finite, or have nothing in common, `StorageError` when the disk
    is full.
    """
    before, after = Checkpoint(base), Checkpoint(target)
    common = {name: (before.entries[name], entry) for name, entry in after.entries.items() if name in before.entries}
    _check_shapes(base, target, common)
    shared = {name for name, (old, new) in common.items() if _can_subtract(old.dtype, new.dtype)}
    if not shared:
        raise WeightsError(
            f"{target} has no tensor in common with {base}: the first ones are {next(iter(after.entries), 'none')} and "
            f"{next(iter(before.entries), 'none')}.",
            remedy="name two models of one architecture",
        )
    specs = [
        TensorSpec(name, _UNSIGNED[entry.dtype.itemsize] if name in shared else entry.dtype, entry.shape)
        for name, entry in after.entries.items()
    ]
    parent, origin = describe_source(base, None, "base"), describe_source(target, None, "target")
    tensors: dict[str, TargetTensor] = {}
    with atomic_folder(out) as folder, ThreadPoolExecutor(2) as executor:

        def subtract(name: str) -> torch.Tensor:
            difference, tensors[name] = _subtract(before if name in shared else None, after, name, executor)
            return difference

        shards = keep_shards(after, specs, max_shard_bytes)
        written = write_checkpoint(folder, specs, subtract, shards=shards, progress=progress)
        copy_files(target, folder, MODEL_FILES)
        facts = DeltaFacts(
            base_name=base_name or parent.name,
            tensors={spec.name: tensors[spec.name] for spec in specs},
            unchanged=sum(_is_unchanged(tensor, after.entries[name]) for name, tensor in tensors.items()),
            dropped=[name for name in before.entries if name not in after.entries],
        )
        manifest = Manifest(
            kind="delta",
            name=out.name,
            chat_format=origin.chat_format,
            tokenizer_sha256=origin.tokenizer_sha256,
            license=origin.license or parent.license,
            parents={**parent.parents, **origin.parents},
            facts=msgspec.to_builtins(facts),
            versions=library_versions("torch", "numpy"),
        )
        return write_manifest(folder, manifest, hashed=written)


def _check_shapes(base: Path, target: Path, common: Mapping[str, tuple[TensorSpec, TensorSpec]]) -> None:
    """Raise `WeightsError` where two tensors differ in more than their number of rows."""
    for name, (old, new) in common.items():
        if len(old.shape) != len(new.shape) or old.shape[1:] != new.shape[1:]:
            raise WeightsError(
                f"{name} is {_show(old)} in {base} and {_show(new)} in {target}: these are other rows, not more of them.",
                remedy="name the model that the target was trained from",
            )


def _can_subtract(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether one can be rounded to the other."""
    return old == new or (old.is_floating_point and new.is_floating_point)


def _is_unchanged(tensor: TargetTensor, entry: TensorSpec) -> bool:
    base = tensor.base
    return base is not None and (base.dtype, base.shape, base.sha256) == (tensor.dtype, entry.shape, tensor.sha256)


def _subtract(before: Checkpoint | None, after: Checkpoint, name: str, executor: Executor) -> tuple[torch.Tensor, TargetTensor]:
    """One tensor's difference, or, without `before`, the tensor."""
    entry = after.entries[name]
    result = torch.empty(entry.shape, dtype=_UNSIGNED[entry.dtype.itemsize])
    flat = bits(result)
    readers = [TensorReader(checkpoint, name) for checkpoint in (after, before) if checkpoint is not None]
    for start, (new, *old) in read_together(readers, executor):
        _combine(np.subtract, bits(new), [bits(values.to(entry.dtype)) for values in old], flat[start : start + len(new)])
    dtype, sha256 = DTYPE_NAMES[entry.dtype], readers[0].sha256
    if before is None:
        return result.view(entry.dtype), TargetTensor(dtype, sha256)
    source = before.entries[name]
    base = BaseTensor(DTYPE_NAMES[source.dtype], source.shape, _ends_sha256(before, name), readers[1].sha256)
    return result, TargetTensor(dtype, sha256, base)


def _combine(operation: np.ufunc, left: np.ndarray, right: list[np.ndarray], out: np.ndarray) -> None:
    """`left` into `out`, with `right` added or taken away from as many elements as both have."""
    common = 0
    for known in right:
        common = min(len(known), len(out))
        operation(left[:common], known[:common], out=out[:common])
    out[common:] = left[common:]


def _ends_sha256(checkpoint: Checkpoint, name: str) -> str:
    size = checkpoint.entries[name].size_bytes
    digest = hashlib.sha256()
    for begin, end in ((0, min(size, _END_BYTES)), (max(size - _END_BYTES, 0), size)):
        digest.update(checkpoint.read_bytes(name, begin, end).numpy().data)
    return digest.hexdigest()


class Delta:
    """A folder that `make_delta` wrote, opened for reading. Raises `ArtifactError` or `WeightsError` when it is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, kind="delta")
        try:
            self.facts = msgspec.convert(self.manifest.facts, DeltaFacts)
        except (msgspec.ValidationError, KeyError) as error:
            raise WeightsError(f"the manifest of {folder} is damaged: {error}.", remedy="fetch the delta again") from error
        self.checkpoint = Checkpoint(folder)
        for name in {**self.facts.tensors, **self.checkpoint.entries}:
            self._check_entry(name)

    def _check_entry(self, name: str) -> None:
        entry, tensor = self.checkpoint.entries.get(name), self.facts.tensors.get(name)
        dtype = DTYPES.get(tensor.dtype) if tensor is not None else None
        wanted = dtype if dtype is None or tensor is None or tensor.base is None else _UNSIGNED[dtype.itemsize]
        if entry is None or wanted is None or entry.dtype != wanted:
            raise WeightsError(
                f"{name} in {self.folder} is {entry.dtype if entry else 'missing'}; the manifest says {wanted or 'not there'}.",
                remedy="fetch the delta again",
            )

    def check_base(self, base: Checkpoint) -> None:
        """Raise `WeightsError` naming the first tensor whose dtype, shape, first or last bytes are not those of the base that
        the delta was made from."""
        for name, tensor in self.facts.tensors.items():
            if (known := tensor.base) is None:
                continue
            entry = base.entries.get(name)
            if entry is None:
                raise self._wrong_base(base, f"it has no {name}")
            if (DTYPE_NAMES[entry.dtype], entry.shape) != (known.dtype, known.shape):
                raise self._wrong_base(base, f"{name} is {_show(entry)}, not {_show_shape(known.dtype, known.shape)}")
            if _ends_sha256(base, name) != known.ends_sha256:
                raise self._wrong_base(base, f"{name} has other values")

    def add(self, base: Checkpoint, name: str, executor: Executor) -> torch.Tensor:
        """One tensor of the target. Raises `WeightsError` when the base's, or what comes out, has not the SHA-256 that it
        had."""
        tensor, entry = self.facts.tensors[name], self.checkpoint.entries[name]
        result = torch.empty(entry.shape, dtype=DTYPES[tensor.dtype])
        flat = bits(result)
        readers = [TensorReader(self.checkpoint, name, finite=False, hashed=False)]
        if tensor.base is not None:
            readers.append(TensorReader(base, name, finite=False))
        digest = hashlib.sha256()
        hashing: Future[None] | None = None
        for start, (difference, *old) in read_together(readers, executor):
            piece = flat[start : start + len(difference)]
            _combine(np.add, bits(difference), [bits(values.to(result.dtype)) for values in old], piece)
            if hashing is not None:
                hashing.result()
            hashing = executor.submit(digest.update, piece.data)
        if hashing is not None:
            hashing.result()
        if tensor.base is not None and readers[1].sha256 != tensor.base.sha256:
            raise self._wrong_base(base, f"{name} has other values, or is damaged")
        if digest.hexdigest() != tensor.sha256:
            raise WeightsError(f"{name} in {self.folder} is damaged.", remedy="fetch the delta again")
        return result

    def _wrong_base(self, base: Checkpoint, why: str) -> WeightsError:
        name = self.facts.base_name
        return WeightsError(
            f"{base.folder} is not the base of {self.folder}, which is {name}: {why}.", remedy=f"name {name}'s folder"
        )


def _show(tensor: TensorSpec) -> str:
    return _show_shape(DTYPE_NAMES[tensor.dtype], tensor.shape)


def _show_shape(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} of {' × '.join(map(str, shape)) or 'one value'}"


def apply_delta(
    base: Path, delta_folder: Path, out: Path, *, max_shard_bytes: int | None = None, progress: Progress | None = None
) -> Manifest:
    """Write `base` + a delta of `make_delta`: the very target, in its shards unless told otherwise.

    The base is checked first, which takes a second, and again in whole on the way. `progress(done, total)` counts bytes. Raises
    `WeightsError` when the base is another or anything is damaged, `StorageError` when the disk is full.
    """
    delta, before = Delta(delta_folder), Checkpoint(base)
    delta.check_base(before)
    specs = [
        TensorSpec(entry.name, DTYPES[delta.facts.tensors[name].dtype], entry.shape)
        for name, entry in delta.checkpoint.entries.items()
    ]
    sources = [describe_source(base, None, "base"), describe_source(delta_folder, None, "delta")]
    with atomic_folder(out) as folder, ThreadPoolExecutor(3) as executor:
        shards = keep_shards(delta.checkpoint, specs, max_shard_bytes)
        written = write_checkpoint(
            folder, specs, lambda name: delta.add(before, name, executor), shards=shards, progress=progress
        )
        copy_files(delta_folder, folder, MODEL_FILES)
        manifest = Manifest(
            kind="model",
            name=out.name,
            chat_format=delta.manifest.chat_format,
            tokenizer_sha256=delta.manifest.tokenizer_sha256,
            license=delta.manifest.license,
            parents={role: sha256 for source in sources for role, sha256 in source.parents.items()},
            facts={"tensors": len(specs)},
            versions=library_versions("torch", "numpy"),
        )
        return write_manifest(folder, manifest, hashed=written)
