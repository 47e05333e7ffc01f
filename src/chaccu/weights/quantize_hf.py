"""A model's Hugging Face folder with its linear weights in fewer bits: nf4, int8 or fp8, tensor by tensor.

Invariants: embeddings, output projection, norms and biases stay as they are; which weights are linear is told by the names of
their modules, which are those of the decoders of transformers, and a model with none of them is refused; values that are not
finite are an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from chaccu.artifact import Manifest, atomic_folder, copy_files, library_versions, write_manifest
from chaccu.errors import WeightsError
from chaccu.weights.checkpoint import MAX_SHARD_BYTES, Checkpoint, Progress, require_finite, write_checkpoint
from chaccu.weights.fp8_form import fp8_config, fp8_specs, pack_fp8
from chaccu.weights.int8_form import Int8Form
from chaccu.weights.merge import change_config
from chaccu.weights.model_files import MODEL_FILES, describe_source, has_conv1d, read_config
from chaccu.weights.nf4_form import nf4_config, pack_rows, packed_specs, require_bitsandbytes
from chaccu.weights.safetensors_file import TensorSpec

HF_TYPES = ("nf4", "int8", "fp8")
_LIBRARIES = {"nf4": ("bitsandbytes",), "int8": ("torchao",)}
# Modules of linear weights: LLaMA, Mistral, Qwen, Gemma; Phi-3; Falcon, GPT-NeoX; OPT.
_LINEAR = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("qkv_proj", "gate_up_proj"),
        *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        *("out_proj", "fc1", "fc2"),
    )
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class _Form(Protocol):
    """How one type keeps a weight."""

    def specs(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[TensorSpec]: ...

    def pack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]: ...

    def metadata(self, packed: dict[str, tuple[tuple[int, ...], torch.dtype]], plain: list[str]) -> dict[str, str]: ...

    def config(self, kept: list[str]) -> dict[str, Any]: ...


class _Nf4:
    def __init__(self, dtype: torch.dtype) -> None:
        require_bitsandbytes("--type nf4")
        self._dtype = dtype

    def specs(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[TensorSpec]:
        return packed_specs(name, shape)

    def pack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return pack_rows(name, tuple(weight.shape), weight.dtype, lambda begin, end: weight[begin:end].float())

    def metadata(self, packed: dict[str, tuple[tuple[int, ...], torch.dtype]], plain: list[str]) -> dict[str, str]:
        return {}

    def config(self, kept: list[str]) -> dict[str, Any]:
        return nf4_config(self._dtype, kept)


class _Fp8:
    def specs(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[TensorSpec]:
        return fp8_specs(name, shape)

    def pack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return pack_fp8(name, weight)

    def metadata(self, packed: dict[str, tuple[tuple[int, ...], torch.dtype]], plain: list[str]) -> dict[str, str]:
        return {}

    def config(self, kept: list[str]) -> dict[str, Any]:
        return fp8_config(kept)


def _form(kind: str, dtype: torch.dtype) -> _Form:
    if kind == "nf4":
        return _Nf4(dtype)
    return Int8Form() if kind == "int8" else _Fp8()


def quantize_hf(
    source: Path, out: Path, kind: str, *, max_shard_bytes: int = MAX_SHARD_BYTES, progress: Progress | None = None
) -> Manifest:
    """Write the model in `source` with its linear weights in `kind`, one of `HF_TYPES`. `progress(done, total)` counts bytes.

    Raises `WeightsError` for a model that is quantised already or has no weights that are known to be linear,
    `MissingDependencyError` without the type's library, `StorageError` when the disk is full.
    """
    work = _Quantization(source, kind)
    with atomic_folder(out) as folder:
        written = write_checkpoint(
            folder, work.specs(), work.read, max_shard_bytes=max_shard_bytes, metadata=work.metadata(), progress=progress
        )
        copy_files(source, folder, MODEL_FILES)
        change_config(folder, {"quantization_config": work.form.config(work.kept)})
        manifest = msgspec.structs.replace(
            describe_source(source, work.checkpoint, "source"),
            name=out.name,
            settings={"type": kind, "quantized_weights": len(work.linear), "kept_modules": work.kept},
            versions=library_versions("safetensors", "torch", *_LIBRARIES.get(kind, ())),
        )
        return write_manifest(folder, manifest, hashed=written)


class _Quantization:
    """The quantised model's tensors, one at a time. `linear`: names of the weights that change; `kept`: modules of those of two
    dimensions that do not.
    """

    def __init__(self, source: Path, kind: str) -> None:
        config = read_config(source)
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method")
            raise WeightsError(f"{source} is quantised already, as {method}.", remedy="quantise the model in 16 bits")
        if has_conv1d(config):
            raise WeightsError(
                f"{source} is a {config['model_type']}, whose weights lie turned over: {', '.join(HF_TYPES)} do not take them.",
                remedy="use a GGUF type where there is one",
            )
        self._source = source
        self.checkpoint = Checkpoint(source)
        entries = self.checkpoint.entries
        self.linear = {name: entry for name, entry in entries.items() if _is_linear(entry)}
        if not self.linear:
            raise WeightsError(
                f"{source} has no weights that are known to be linear ({', '.join(sorted(_LINEAR)[:4])} …).",
                remedy=f"it is a {config.get('model_type', 'model of unknown type')}: use one of a known decoder",
            )
        # The output projection may be the embedding, under no name of its own: it is kept in any case.
        plain = {
            name.removesuffix(".weight") for name, entry in entries.items() if name not in self.linear and len(entry.shape) == 2
        }
        self.kept = sorted(plain | {"lm_head"})
        self.form = _form(kind, next(iter(self.linear.values())).dtype)
        # Of the weight that was packed last, what is not written yet.
        self._parts: dict[str, torch.Tensor] = {}
        self._weight_of = {
            spec.name: name for name, entry in self.linear.items() for spec in self.form.specs(name, entry.shape, entry.dtype)
        }

    def specs(self) -> list[TensorSpec]:
        """Every tensor that will be written, in the order of the source's files."""
        return list(self._specs())

    def _specs(self) -> Iterator[TensorSpec]:
        for name, entry in self.checkpoint.entries.items():
            if name in self.linear:
                yield from self.form.specs(name, entry.shape, entry.dtype)
            else:
                yield TensorSpec(name, entry.dtype, entry.shape)

    def metadata(self) -> dict[str, str]:
        """What is said of the tensors in the header of every file."""
        packed = {name: (entry.shape, entry.dtype) for name, entry in self.linear.items()}
        return self.form.metadata(packed, [name for name in self.checkpoint.entries if name not in self.linear])

    def read(self, name: str) -> torch.Tensor:
        """One of `specs`."""
        if name not in self._parts:
            weight = self._weight_of.get(name, name)
            tensor = self.checkpoint.read(weight)
            require_finite(tensor, weight, self._source)
            if weight not in self.linear:
                return tensor
            self._parts = self.form.pack(weight, tensor)
        return self._parts.pop(name)


def _is_linear(entry: TensorSpec) -> bool:
    module, _, ending = entry.name.rpartition(".")
    return ending == "weight" and len(entry.shape) == 2 and entry.dtype in _FLOATS and module.rpartition(".")[2] in _LINEAR
