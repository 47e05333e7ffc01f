"""A LoRA adapter as a GGUF file, which llama.cpp applies beside the base that it has loaded.

The factors are written as they are, in float32: llama.cpp computes alpha / rank · B·(A·x) for itself (GGUF specification,
`adapter.*`). Invariant: every weight that the adapter changes is in the base, in its shape; the base is its Hugging Face
folder, or a GGUF file of it, however quantised.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chaccu.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_folder,
    library_versions,
    manifest_sha256,
    read_manifest,
    sha256_file,
    write_manifest,
)
from chaccu.errors import WeightsError
from chaccu.lineage import check_base
from chaccu.weights.adapter import Adapter
from chaccu.weights.gguf_architectures import Architecture, ModelConfig, find_architecture, find_architecture_of
from chaccu.weights.gguf_file import GgufFile, pack_pairs, write_gguf
from chaccu.weights.gguf_tensors import F32, find_arrangement
from chaccu.weights.hashed_file import HashedFile

if TYPE_CHECKING:
    import numpy as np

_FILE_NAME = "adapter.gguf"


class _Base(msgspec.Struct, frozen=True):
    """What the weights of a base are: its GGUF name and shape (out × in), by Hugging Face's name."""

    path: Path
    architecture: Architecture
    heads: int
    kv_heads: int
    weights: dict[str, tuple[str, tuple[int, ...]]]


def write_adapter_gguf(adapter_folder: Path, gguf: Path | None, out: Path, *, base: Path | None = None) -> Manifest:
    """Write the folder `out` with the adapter as GGUF, for the model in the file `gguf`, or else in the folder `base`.

    `base` beside `gguf`: to compare manifests with. Raises `WeightsError` when the adapter is of another base, or of a kind
    that llama.cpp does not take.
    """
    adapter = Adapter(adapter_folder)
    if adapter.config_changes:
        raise WeightsError(
            f"{adapter_folder} was trained with positions stretched, which llama.cpp does not take from an adapter.",
            remedy="merge it: chaccu weights merge",
        )
    if base is not None:
        check_base(base, adapter_folder)
    described = _describe_file(gguf) if gguf is not None else _describe_folder(base)
    tensors, scale = _pair_up(adapter, described)
    pairs = pack_pairs(
        {
            "general.type": "adapter",
            "general.architecture": described.architecture.name,
            "adapter.type": "lora",
            "adapter.lora.alpha": scale,
        }
    )
    table = [(name, values.shape, F32) for name, values in tensors.items()]
    with atomic_folder(out) as folder:
        with HashedFile(folder / _FILE_NAME) as target:
            for _ in write_gguf(target, pairs=pairs, tensors=table, packed=tensors.__getitem__):
                pass
        assert target.entry is not None
        return write_manifest(folder, _describe(adapter_folder, gguf, base, out), hashed={_FILE_NAME: target.entry})


def _describe_file(path: Path) -> _Base:
    file = GgufFile(path)
    architecture = find_architecture(file)
    heads = int(file.require(f"{file.architecture}.attention.head_count"))
    weights = {
        hf_name: (name, entry.shape)
        for name, entry in file.tensors.items()
        if (hf_name := architecture.hf_name(name)) is not None
    }
    return _Base(path, architecture, heads, int(file.get(f"{file.architecture}.attention.head_count_kv", heads)), weights)


def _describe_folder(folder: Path | None) -> _Base:
    from chaccu.weights.checkpoint import Checkpoint

    if folder is None:
        raise WeightsError("neither the base's folder nor a GGUF file of it is named.", remedy="name one of them")
    config = ModelConfig(folder)
    architecture = find_architecture_of(config)
    heads = int(config.require("num_attention_heads"))
    weights = {
        name: (known, entry.shape)
        for name, entry in Checkpoint(folder).entries.items()
        if (known := architecture.gguf_name(name)) is not None
    }
    return _Base(folder, architecture, heads, int(config.get("num_key_value_heads", heads)), weights)


def _pair_up(adapter: Adapter, base: _Base) -> tuple[dict[str, np.ndarray], float]:
    """A and B of each weight by llama.cpp's names, and the alpha that gives them the adapter's scale."""
    import numpy as np

    tensors: dict[str, np.ndarray] = {}
    rank = 0
    for weight in adapter.weights:
        low, high = adapter.factors(weight)
        if weight not in base.weights:
            raise WeightsError(f"the adapter in {adapter.folder} changes {weight}, which {base.path} does not have.")
        name, found = base.weights[weight]
        wanted = (len(high), low.shape[1])
        if wanted != found:
            raise WeightsError(
                f"{weight} is {found[0]} × {found[1]} in {base.path}, and the adapter in {adapter.folder} is for another "
                f"shape: {wanted[0]} × {wanted[1]}.",
                remedy="name the base that it was trained on",
            )
        rank = len(low)
        arrangement = find_arrangement(base.architecture, name, len(high), base.heads, base.kv_heads)
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(low)
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(arrangement.to_gguf(high))
    return tensors, adapter.scale * rank


def _describe(adapter: Path, gguf: Path | None, base: Path | None, out: Path) -> Manifest:
    """What the adapter's own manifest says of its base stays said."""
    made = Manifest(
        kind="adapter",
        name=out.name,
        inputs={gguf.name: sha256_file(gguf)} if gguf is not None else {},
        parents={"base": manifest_sha256(base)} if base is not None and (base / MANIFEST_NAME).is_file() else {},
        versions=library_versions("gguf", "safetensors"),
    )
    if not (adapter / MANIFEST_NAME).is_file():
        return made
    origin = read_manifest(adapter, kind="adapter")
    parents = {**origin.parents, "adapter": manifest_sha256(adapter)}
    return msgspec.structs.replace(origin, name=out.name, parents=parents, inputs=made.inputs, versions=made.versions, files={})
