"""A LoRA adapter as a GGUF file, which llama.cpp applies beside the base that it has loaded.

The factors are written as they are, in float32: llama.cpp computes alpha / rank · B·(A·x) for itself (GGUF specification,
`adapter.*`). Invariant: every weight that the adapter changes is in the base's file, in its shape. It ignores how the base is
quantised.
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
from chaccu.weights.gguf_file import GgufFile, float_pair, string_pair, write_gguf
from chaccu.weights.gguf_import import find_architecture, gguf_values

if TYPE_CHECKING:
    import numpy as np

_FILE_NAME = "adapter.gguf"
_F32 = 0


def write_adapter_gguf(adapter_folder: Path, gguf: Path, out: Path, *, base: Path | None = None) -> Manifest:
    """Write the folder `out` with the adapter as GGUF, for the model in `gguf`; `base`: its folder, to compare manifests with.

    Raises `WeightsError` when the adapter is of another base, or of a kind that llama.cpp does not take.
    """
    adapter, file = Adapter(adapter_folder), GgufFile(gguf)
    if adapter.config_changes:
        raise WeightsError(
            f"{adapter_folder} was trained with positions stretched, which llama.cpp does not take from an adapter.",
            remedy="merge it: chaccu weights merge --gguf",
        )
    if base is not None:
        check_base(base, adapter_folder)
    tensors, scale = _pair_up(adapter, file)
    pairs = (
        string_pair("general.type", "adapter"),
        string_pair("general.architecture", file.architecture),
        string_pair("adapter.type", "lora"),
        float_pair("adapter.lora.alpha", scale),
    )
    table = [(name, values.shape, _F32) for name, values in tensors.items()]
    with atomic_folder(out) as folder:
        with (folder / _FILE_NAME).open("wb") as target:
            for _ in write_gguf(target, pairs=(len(pairs), b"".join(pairs)), tensors=table, packed=tensors.__getitem__):
                pass
        return write_manifest(folder, _describe(adapter_folder, gguf, out))


def _pair_up(adapter: Adapter, file: GgufFile) -> tuple[dict[str, np.ndarray], float]:
    """A and B of each weight by llama.cpp's names, and the alpha that gives them the adapter's scale."""
    import numpy as np

    architecture = find_architecture(file)
    gguf_names = {architecture.hf_name(name): name for name in file.tensors}
    tensors: dict[str, np.ndarray] = {}
    rank = 0
    for weight in adapter.weights:
        low, high = adapter.factors(weight)
        name = gguf_names.get(weight)
        if name is None:
            raise WeightsError(f"the adapter in {adapter.folder} changes {weight}, which {file.path} does not have.")
        wanted, found = (len(high), low.shape[1]), file.tensors[name].shape
        if wanted != found:
            raise WeightsError(
                f"{weight} is {found[0]} × {found[1]} in {file.path}, and the adapter in {adapter.folder} is for another "
                f"shape: {wanted[0]} × {wanted[1]}.",
                remedy="name a file of the base that it was trained on",
            )
        rank = len(low)
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(low)
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(gguf_values(file, name, high))
    return tensors, adapter.scale * rank


def _describe(adapter: Path, gguf: Path, out: Path) -> Manifest:
    """What the adapter's own manifest says of its base stays said."""
    made = Manifest(
        kind="adapter",
        name=out.name,
        inputs={gguf.name: sha256_file(gguf)},
        versions=library_versions("gguf", "safetensors"),
    )
    if not (adapter / MANIFEST_NAME).is_file():
        return made
    origin = read_manifest(adapter, kind="adapter")
    parents = {**origin.parents, "adapter": manifest_sha256(adapter)}
    return msgspec.structs.replace(origin, name=out.name, parents=parents, inputs=made.inputs, versions=made.versions, files={})
