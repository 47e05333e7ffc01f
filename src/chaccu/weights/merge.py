"""A LoRA adapter into the Hugging Face folder of its base, tensor by tensor; the base may lie in bitsandbytes' four bits.

Invariants: what the adapter does not change is written as it was, or, where four bits become sixteen, as what they stand for;
what it changes is reckoned in float32 and rounded once. How much that rounding takes away is measured on every changed weight
and stated. Values that are not finite, in base or adapter, are an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from chaccu.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_folder,
    copy_files,
    library_versions,
    manifest_sha256,
    read_manifest,
    sha256_file,
    write_json,
    write_manifest,
)
from chaccu.errors import UsageError, WeightsError
from chaccu.hub import find_model_folder
from chaccu.lineage import check_base
from chaccu.weights.adapter import Adapter
from chaccu.weights.checkpoint import MAX_SHARD_BYTES, Checkpoint, Progress, require_finite, write_checkpoint
from chaccu.weights.merge_error import ErrorMeter, MergeError
from chaccu.weights.model_files import MODEL_FILES, describe_source, has_conv1d, read_config
from chaccu.weights.nf4_form import PackedWeight, find_packed, pack_rows, packed_specs, require_bitsandbytes
from chaccu.weights.row_pieces import Rows, split_rows
from chaccu.weights.safetensors_file import TensorSpec
from chaccu.weights.token_identity import pass_gate


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    requantize: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write base + adapter as a Hugging Face folder, each a folder or a hub id.

    A weight keeps its dtype; one in bitsandbytes' four bits gets that which it had before, or, with `requantize`, is packed
    into nf4 again. `progress(done, total)` counts bytes; the manifest's facts hold the `merge_error`.

    Raises `WeightsError` when the adapter is of another base, or a file is damaged or not finite; `StorageError` when the disk
    is full; `UsageError` for `requantize` with a base that is not in nf4.
    """
    base_folder = find_model_folder(base, error=WeightsError)
    opened = Adapter(find_model_folder(adapter, error=WeightsError))
    check_base(base_folder, opened.folder)
    merge = _Merge(base_folder, opened, requantize=requantize)
    with atomic_folder(out) as folder:
        written = write_checkpoint(folder, merge.specs(), merge.read, max_shard_bytes=max_shard_bytes, progress=progress)
        copy_files(base_folder, folder, MODEL_FILES)
        change_config(folder, merge.config_changes())
        manifest = describe_merge(
            describe_source(base_folder, merge.checkpoint, "base"), opened, out.name, merge.meter.result()
        )
        pass_gate(folder, manifest)
        settings = {**manifest.settings, "requantized": requantize}
        return write_manifest(folder, msgspec.structs.replace(manifest, settings=settings), hashed=written)


class _Merge:
    """The merged model's tensors, one at a time. `meter` has what their rounding cost."""

    def __init__(self, base: Path, adapter: Adapter, *, requantize: bool) -> None:
        self._base, self._adapter, self._requantize = base, adapter, requantize
        self.checkpoint = Checkpoint(base)
        self.meter = ErrorMeter()
        self._packed = find_packed(self.checkpoint)
        self._check_form(read_config(base))
        adapter.check_fits(weight_shapes(self.checkpoint), base)
        self._weight_of = {part: weight for weight, packed in self._packed.items() for part in packed.parts}
        # Of the weight that was packed last, what is not written yet.
        self._parts: dict[str, torch.Tensor] = {}

    def _check_form(self, config: dict[str, Any]) -> None:
        method = (config.get("quantization_config") or {}).get("quant_method")
        if method is not None and not self._packed:
            raise WeightsError(
                f"{self._base} is quantised as {method}, which an adapter is not merged into.",
                remedy="name its base in 16 bits, or in bitsandbytes' nf4",
            )
        if self._packed and has_conv1d(config):
            raise WeightsError(
                f"{self._base} is a {config['model_type']} in four bits, whose weights lie turned over.",
                remedy="name its base in 16 bits",
            )
        if not self._requantize:
            return
        if any(packed.kind != "nf4" for packed in self._packed.values()) or not self._packed:
            raise UsageError(
                f"{self._base} is not in nf4, so that --requantize has nothing to go back to.", remedy="leave --requantize out"
            )
        require_bitsandbytes("--requantize")

    def config_changes(self) -> dict[str, Any]:
        """What in the merged model's config is not the base's; None: it goes."""
        changes: dict[str, Any] = dict(self._adapter.config_changes)
        if self._packed and not self._requantize:
            dtype = next(iter(self._packed.values())).dtype
            changes |= {"quantization_config": None, "torch_dtype": None, "dtype": str(dtype).removeprefix("torch.")}
        return changes

    def specs(self) -> list[TensorSpec]:
        """Every tensor that will be written, in the order of the base's files."""
        return list(self._specs())

    def _specs(self) -> Iterator[TensorSpec]:
        begun: set[str] = set()
        for name, entry in self.checkpoint.entries.items():
            weight = self._weight_of.get(name)
            if weight is None or (self._requantize and weight not in self._adapter.weights):
                yield TensorSpec(name, entry.dtype, entry.shape)
            elif weight not in begun:
                begun.add(weight)
                packed = self._packed[weight]
                if self._requantize:
                    yield from packed_specs(weight, packed.shape)
                else:
                    yield TensorSpec(weight, packed.dtype, packed.shape)

    def read(self, name: str) -> torch.Tensor:
        """One of `specs`, merged."""
        if name in self._parts:
            return self._parts.pop(name)
        weight = self._weight_of.get(name)
        if weight is not None and self._requantize and weight in self._adapter.weights:
            self._parts = self._merge_packed(weight)
            return self._parts.pop(name)
        if weight is not None and not self._requantize:
            return self._unpack(weight)
        tensor = self.checkpoint.read(name)
        require_finite(tensor, name, self._base)
        if name in self._adapter.weights:
            self._merge_rows(name, lambda begin, end: tensor[begin:end].float(), tensor)
        return tensor

    def _merge_rows(self, weight: str, rows: Rows, target: torch.Tensor) -> None:
        """Write the merged weight into `target`, which may be what `rows` reads."""
        change = self._adapter.change(weight)
        for begin, end in split_rows(tuple(target.shape)):
            base = rows(begin, end)
            meant = change.apply(begin, base)
            written = meant.to(target.dtype)
            self.meter.add(weight, base, meant, written.float())
            target[begin:end] = written

    def _unpack(self, weight: str) -> torch.Tensor:
        packed = self._packed[weight]
        rows = packed.open()
        target = torch.empty(packed.shape, dtype=packed.dtype)
        if weight in self._adapter.weights:
            self._merge_rows(weight, rows, target)
        else:
            for begin, end in split_rows(packed.shape):
                target[begin:end] = rows(begin, end)
        return target

    def _merge_packed(self, weight: str) -> dict[str, torch.Tensor]:
        packed = self._packed[weight]
        rows, change = packed.open(), self._adapter.change(weight)
        parts = pack_rows(weight, packed.shape, packed.dtype, lambda begin, end: change.apply(begin, rows(begin, end)))
        # The scales are rounded once all are known: only now can it be told what stands there.
        written = PackedWeight(weight, "nf4", list(parts), parts.__getitem__, self._base).open()
        for begin, end in split_rows(packed.shape):
            base = rows(begin, end)
            self.meter.add(weight, base, change.apply(begin, base), written(begin, end))
        return parts


def weight_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape by name of a model's weights, those in four bits as they are when unpacked."""
    packed = {name: weight.shape for name, weight in find_packed(checkpoint).items()}
    return {name: entry.shape for name, entry in checkpoint.entries.items()} | packed


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    """Give a model's config the values of `changes`; None takes one away."""
    if not changes:
        return
    config = read_config(folder)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if "rope_parameters" in changes:
        text.pop("rope_scaling", None)  # the older name, which stands before rope_parameters where both are there
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            (config if key in ("dtype", "quantization_config") else text)[key] = value
    write_json(folder / "config.json", config)


def describe_merge(base: Manifest, adapter: Adapter, name: str, error: MergeError | None) -> Manifest:
    """The manifest of a merged model, without its files: `base` is what its base gives it, and what the adapter's own manifest
    says of format and tokenizer stands before that.
    """
    parents, inputs = dict(base.parents), dict(base.inputs)
    chat_format, tokenizer_sha256 = base.chat_format, base.tokenizer_sha256
    if (adapter.folder / MANIFEST_NAME).is_file():
        origin = read_manifest(adapter.folder)
        parents["adapter"] = manifest_sha256(adapter.folder)
        chat_format, tokenizer_sha256 = origin.chat_format or chat_format, origin.tokenizer_sha256 or tokenizer_sha256
    else:
        inputs["adapter_model.safetensors"] = sha256_file(adapter.folder / "adapter_model.safetensors")
    return msgspec.structs.replace(
        base,
        name=name,
        chat_format=chat_format,
        tokenizer_sha256=tokenizer_sha256,
        parents=parents,
        inputs=inputs,
        settings={"adapted_weights": len(adapter.weights)},
        facts={"merge_error": msgspec.to_builtins(error)},
        versions=library_versions("safetensors", "torch", "gguf", "bitsandbytes"),
    )
