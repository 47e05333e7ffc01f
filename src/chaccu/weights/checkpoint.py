"""A Hugging Face folder's weights as one mapping of names to tensors, whatever files they lie in; and such a folder's writing.

Invariants: one tensor is in memory at a time; an index and the shards that it names agree, or the folder is refused with the
command that mends it; what is written gets the names, the index and the limits on a file's size that transformers has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from chaccu.artifact import FileEntry, require_free_space, sha256_file, storage_errors, write_json
from chaccu.errors import WeightsError
from chaccu.weights.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec

Progress = Callable[[int, int], None]
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# transformers' own default.
MAX_SHARD_BYTES = 5_000_000_000
_SPARE_BYTES = 64_000_000


class WeightsFile(Protocol):
    """A file of tensors by name, each read when it is asked for."""

    @property
    def path(self) -> Path: ...

    @property
    def entries(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> torch.Tensor: ...

    def read_bytes(self, name: str, begin: int, end: int) -> torch.Tensor: ...


class Checkpoint:
    """The weights of `folder`, by name, in the order of its files: `files`, else those in safetensors.

    Raises `WeightsError` when it holds none in safetensors, when a file is damaged, or when index and files differ.
    """

    def __init__(self, folder: Path, *, files: Sequence[WeightsFile] | None = None) -> None:
        self.folder = folder
        self.files: Sequence[WeightsFile] = files or [SafetensorsFile(path) for path in _list_shards(folder)]
        self._homes: dict[str, WeightsFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self._homes:
                    first = self._homes[name].path
                    raise WeightsError(f"{name} is both in {first} and in {file.path.name}.", remedy=_repair(folder))
                self._homes[name] = file
        if files is None:
            self._check_index()

    def _check_index(self) -> None:
        places = read_index(self.folder)
        if places is None:
            return
        found = self.places
        odd = next((name for name in {**places, **found} if places.get(name) != found.get(name)), None)
        if odd is not None:
            raise WeightsError(
                f"{self.folder / INDEX_NAME} says that {odd} is in {places.get(odd, 'no file')}, and it is in "
                f"{found.get(odd, 'no file')}.",
                remedy=_repair(self.folder),
            )

    @cached_property
    def entries(self) -> dict[str, TensorSpec]:
        """Every tensor's dtype and shape."""
        return {name: file.entries[name] for name, file in self._homes.items()}

    @property
    def places(self) -> dict[str, str]:
        """File by tensor name, as an index has it."""
        return {name: file.path.name for name, file in self._homes.items()}

    @property
    def size_bytes(self) -> int:
        """Of all tensors together."""
        return sum(entry.size_bytes for entry in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        return self._homes[name].read(name)

    def read_bytes(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Some of a tensor's bytes."""
        return self._homes[name].read_bytes(name, begin, end)

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each file of weights, by its name."""
        return {file.path.name: sha256_file(file.path) for file in self.files}


def read_index(folder: Path, name: str = INDEX_NAME) -> dict[str, str] | None:
    """File by tensor name, as the folder's index has it; None without an index. Raises `WeightsError` when it is damaged."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        with storage_errors(path):
            places: dict[str, str] = msgspec.convert(json.loads(path.read_bytes())["weight_map"], dict[str, str])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged ({error}).", remedy=_repair(folder)) from error
    return places


def _list_shards(folder: Path) -> list[Path]:
    """Those that the index names, or all that there are."""
    places = read_index(folder)
    found = sorted(folder.glob("*.safetensors"))
    shards = found if places is None else [folder / name for name in sorted(set(places.values()))]
    # Beside a whole model, adapters are none of its shards.
    shards = [path for path in shards if path.name != "adapter_model.safetensors"]
    missing = next((path for path in shards if not path.is_file()), None)
    if missing is not None:
        raise WeightsError(f"{folder / INDEX_NAME} names {missing.name}, which is not there.", remedy="fetch it again")
    if not shards:
        pickled = any(folder.glob("*.bin"))
        raise WeightsError(
            f"{folder} holds no safetensors.",
            remedy=_repair(folder) if pickled else "name a folder with a model's weights in Hugging Face's form",
        )
    return shards


def _repair(folder: Path) -> str:
    return f"chaccu weights repair {folder}"


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[TensorSpec]]:
    """Which tensors go into which file, in their order; a file is full before its tensors exceed `max_shard_bytes`, but for one
    tensor that alone does."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.size_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.size_bytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{at:05}-of-{len(shards):05}.safetensors": shard for at, shard in enumerate(shards, 1)}


def keep_shards(like: Checkpoint, specs: Iterable[TensorSpec], max_shard_bytes: int | None) -> dict[str, list[TensorSpec]]:
    """Which tensors go into which file: where those of `like` lie, which has all of their names; with a limit as
    `plan_shards`."""
    if max_shard_bytes is not None:
        return plan_shards(specs, max_shard_bytes)
    by_name = {spec.name: spec for spec in specs}
    shards = {file.path.name: [by_name[name] for name in file.entries if name in by_name] for file in like.files}
    shards = {name: shard for name, shard in shards.items() if shard}
    # A single file is found by this name alone.
    return shards if len(shards) > 1 else dict(zip([SINGLE_NAME], shards.values(), strict=False))


def write_checkpoint(
    folder: Path,
    specs: Sequence[TensorSpec],
    read: Callable[[str], torch.Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    shards: Mapping[str, Sequence[TensorSpec]] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, FileEntry]:
    """Write tensors into `folder` (there already, and not yet the artifact), with an index where they fill several files.

    `read(name)` gives each tensor when its turn comes. `shards`: which tensors go into which file, else as `plan_shards` has
    it. `progress(done, total)` counts bytes. Returns size and SHA-256 of each file of weights. Raises `WeightsError` when a
    tensor is not as announced, `StorageError` when the disk is too small.
    """
    total = sum(spec.size_bytes for spec in specs)
    require_free_space(folder, total + _SPARE_BYTES, "the model's weights")
    shards = plan_shards(specs, max_shard_bytes) if shards is None else shards
    written: dict[str, FileEntry] = {}
    done = 0
    for name, shard in shards.items():
        with storage_errors(folder / name), SafetensorsWriter(folder / name, shard, metadata=metadata) as target:
            for spec in shard:
                target.write(read(spec.name))
                done += spec.size_bytes
                if progress:
                    progress(done, total)
        assert target.entry is not None
        written[name] = target.entry
    if len(shards) > 1:
        places = {spec.name: name for name, shard in shards.items() for spec in shard}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})
    return written


def require_finite(tensor: torch.Tensor, name: str, where: Path) -> None:
    """Raise `WeightsError` when a floating-point tensor holds NaN or infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    low, high = torch.aminmax(values)  # which hands NaN on
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise WeightsError(f"{name} in {where} holds values that are not finite.", remedy="fetch or train it again")
