"""A LoRA adapter into a copy of the GGUF file that its base came from; and such a file, unchanged, as a folder to serve.

Invariants: only the adapted tensors change; every other tensor, the tokenizer and the metadata are carried over byte for byte.
An adapted tensor that is quantised is written as Q8_0, since rounding in fewer bits would take most of an adapter away; one in
floating point keeps its type. What the rounding takes is measured and stated.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from chaccu.artifact import (
    Manifest,
    atomic_folder,
    copy_files,
    manifest_sha256,
    read_manifest,
    require_free_space,
    sha256_file,
    write_manifest,
)
from chaccu.conversation import TOKENIZER_FILES
from chaccu.errors import WeightsError
from chaccu.hub import find_model_folder
from chaccu.lineage import check_base
from chaccu.weights.adapter import Adapter
from chaccu.weights.checkpoint import Progress, require_finite
from chaccu.weights.gguf_architectures import find_architecture
from chaccu.weights.gguf_file import GgufFile, packed_bytes, write_gguf
from chaccu.weights.gguf_rope import stretch_pairs
from chaccu.weights.gguf_tensors import BF16, F16, F32, Q8_0, arrangement_in, choose_type, row_blocks
from chaccu.weights.hashed_file import HashedFile
from chaccu.weights.merge import describe_merge
from chaccu.weights.merge_error import ErrorMeter
from chaccu.weights.token_identity import pass_gate

if TYPE_CHECKING:
    import numpy as np


def merge_into_gguf(
    gguf: Path, base: str | Path, adapter: str | Path, out: Path, *, progress: Progress | None = None
) -> Manifest:
    """Write a servable folder: `model.gguf` = `gguf` with the adapter merged in, and the tokenizer.

    `gguf` must be the file that `base` was imported from. `progress(done, total)` counts bytes; the manifest's facts hold the
    `merge_error`. Raises `WeightsError` or `StorageError`.
    """
    base_folder = find_model_folder(base, error=WeightsError)
    opened = Adapter(find_model_folder(adapter, error=WeightsError))
    check_base(base_folder, opened.folder)
    origin, sha256 = read_manifest(base_folder), sha256_file(gguf)
    if sha256 not in origin.inputs.values():
        raise WeightsError(
            f"{base_folder} was not imported from {gguf}.", remedy="name the GGUF file that weights convert read"
        )
    merge = _GgufMerge(GgufFile(gguf), opened, base_folder)
    require_free_space(out.parent, 2 * gguf.stat().st_size, "the merged GGUF model")
    with atomic_folder(out) as folder:
        with HashedFile(folder / "model.gguf") as target:
            pairs = stretch_pairs(merge.file, opened.config_changes)
            alignment = merge.file.alignment
            for done in write_gguf(target, pairs=pairs, tensors=merge.table, packed=merge.packed, alignment=alignment):
                if progress:
                    progress(done, merge.total_bytes)
        copy_files(base_folder, folder, TOKENIZER_FILES)
        carried = msgspec.structs.replace(
            origin, kind="gguf", parents={"base": manifest_sha256(base_folder)}, inputs={gguf.name: sha256}, facts={}, files={}
        )
        manifest = describe_merge(carried, opened, out.name, merge.meter.result())
        pass_gate(folder, manifest)
        assert target.entry is not None
        return write_manifest(folder, manifest, hashed={"model.gguf": target.entry})


class _GgufMerge:
    """The merged file's tensors, one at a time. `table`: their names, shapes and types; `meter` has what rounding cost."""

    def __init__(self, file: GgufFile, adapter: Adapter, base: Path) -> None:
        self.file, self._adapter, self.meter = file, adapter, ErrorMeter()
        architecture = find_architecture(file)
        self._hf_names = {name: hf_name for name in file.tensors if (hf_name := architecture.hf_name(name)) is not None}
        shapes = {hf_name: file.tensors[name].shape for name, hf_name in self._hf_names.items()}
        adapter.check_fits(shapes, base)
        self._types = {
            entry.name: _type_when_merged(entry.type_id, entry.shape)
            if self._hf_names.get(entry.name) in adapter.weights
            else entry.type_id
            for entry in file.tensors.values()
        }
        self.table = [(entry.name, entry.shape, self._types[entry.name]) for entry in file.tensors.values()]

    @property
    def total_bytes(self) -> int:
        """Of all tensors together, as they will be."""
        return sum(packed_bytes(shape, type_id) for _, shape, type_id in self.table)

    def packed(self, name: str) -> np.ndarray:
        """One tensor's bytes, merged where the adapter changes it."""
        import gguf as ggml
        import numpy as np

        weight = self._hf_names.get(name)
        if weight is None or weight not in self._adapter.weights:
            return self.file.packed(name)
        entry, change = self.file.tensors[name], self._adapter.change(weight)
        arrangement, kind = arrangement_in(self.file, name), ggml.GGMLQuantizationType(self._types[name])
        stored, rows = ggml.GGMLQuantizationType(entry.type_id), self.file.packed(name).reshape(entry.shape[0], -1)
        target = np.empty((len(rows), packed_bytes(entry.shape, kind) // len(rows)), np.uint8)
        for begin, end in row_blocks(entry.shape, arrangement):
            there = np.require(ggml.quants.dequantize(rows[begin:end], stored), requirements="W")
            base = torch.from_numpy(np.require(arrangement.to_hf(there), requirements="W"))
            require_finite(base, name, self.file.path)
            # The file may keep the rows in another order; the error is measured in that one.
            meant = arrangement.to_gguf(change.apply(begin, base).numpy())
            data = ggml.quants.quantize(meant, kind)
            written = ggml.quants.dequantize(data, kind).reshape(meant.shape)
            self.meter.add(weight, *(torch.from_numpy(values) for values in (there, meant, written)))
            target[begin:end] = data.view(np.uint8).reshape(end - begin, -1)
        return target


def _type_when_merged(type_id: int, shape: tuple[int, ...]) -> int:
    return type_id if type_id in (F32, F16, BF16) else choose_type(shape, Q8_0)


def wrap_gguf(gguf: Path, base: Path, out: Path) -> Manifest:
    """A servable folder of an unchanged GGUF file: a hard link where the disk allows it, with the imported tokenizer."""
    parent = read_manifest(base)
    with atomic_folder(out) as folder:
        try:
            (folder / "model.gguf").hardlink_to(gguf)
        except OSError:  # another disk, or a file system without links
            (folder / "model.gguf").write_bytes(gguf.read_bytes())
        copy_files(base, folder, TOKENIZER_FILES)
        return write_manifest(
            folder,
            msgspec.structs.replace(parent, kind="gguf", parents={"base": manifest_sha256(base)}, settings={}, files={}),
        )
