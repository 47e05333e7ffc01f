"""LoRA into base weights: as a Hugging Face folder, or straight into a copy of the GGUF file that the base came from.

An adapter's update of a weight W (out × in) is ΔW = alpha / rank · B·A (Hu et al. 2021, arXiv:2106.09685); the rows of single
tokens that it trained take the place of the base's. In the GGUF copy only the adapted tensors change; they are written as Q8_0,
and every other tensor, the tokenizer and the metadata are carried over byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_folder,
    copy_files,
    library_versions,
    manifest_sha256,
    read_manifest,
    require_free_space,
    sha256_file,
    write_json,
    write_manifest,
)
from chaccu.conversation import TOKENIZER_FILES
from chaccu.errors import WeightsError
from chaccu.lineage import check_base
from chaccu.weights.gguf_file import GgufFile, write_gguf
from chaccu.weights.gguf_import import Progress, find_architecture, gguf_values, hf_tensor
from chaccu.weights.gguf_rope import stretch_pairs

if TYPE_CHECKING:
    import numpy as np

_PREFIX = "base_model.model."
_LOW, _HIGH, _ROWS = ".lora_A.weight", ".lora_B.weight", ".token_adapter.trainable_tokens_delta"
_Q8_0 = 8
_BASE_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


class Adapter:
    """A PEFT LoRA adapter folder, opened for reading. Raises `WeightsError` when it is not one or of an unknown kind.

    `config_changes`: values of the base's config that differ in training (stretched positions), and so in the merged model.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        if not (config_file.is_file() and weights_file.is_file()):
            raise WeightsError(
                f"{folder} is no LoRA adapter: it needs {config_file.name} and {weights_file.name}.",
                remedy="name the output folder of chaccu train",
            )
        config = json.loads(config_file.read_text(encoding="utf-8"))
        odd = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
            raise WeightsError(f"{folder} uses {', '.join(odd) or config.get('peft_type')}, which merging does not know.")
        self.folder = folder
        self.scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        named = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
        self.config_changes: dict[str, Any] = (named.facts.get("config_changes") or {}) if named else {}
        # GPT-2's Conv1D: the weights are stored as in × out.
        self._transposed = bool(config.get("fan_in_fan_out"))
        self._tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(str(weights_file)).items()}
        self._row_ids: dict[str, list[int]] = config.get("trainable_token_indices") or {}
        self.weights = sorted(
            name.removesuffix(ending) + ".weight" for name in self._tensors for ending in (_LOW, _ROWS) if name.endswith(ending)
        )
        odd = [name for name in self._tensors if not name.endswith((_LOW, _HIGH, _ROWS))]
        if odd:
            raise WeightsError(f"{folder} holds {odd[0]}, which merging does not know.")

    def check_fits(self, base: Path) -> None:
        """Raise `WeightsError` unless the adapter is finite, and the base in that folder has every weight that it changes, in
        its shape."""
        import numpy as np
        from safetensors import safe_open

        broken = next((name for name, tensor in self._tensors.items() if not np.isfinite(tensor).all()), None)
        if broken is not None:
            raise WeightsError(f"{broken} in {self.folder} holds values that are not finite.", remedy="train it again")

        shapes: dict[str, list[int]] = {}
        for shard in sorted(base.glob("*.safetensors")):
            with safe_open(shard, framework="numpy") as source:
                shapes |= {name: source.get_slice(name).get_shape() for name in source.keys()}  # noqa: SIM118 (no mapping)
        _refuse_unknown(set(self.weights) - set(shapes), base)
        for weight in self.weights:
            wanted = self._shape(weight)
            rows, columns = shapes[weight]
            if any(want not in (None, have) for want, have in zip(wanted, (rows, columns), strict=True)):
                raise WeightsError(
                    f"{weight} is {rows} × {columns} in {base}, and the adapter in {self.folder} is for another shape: "
                    f"{' × '.join('any' if one is None else str(one) for one in wanted)}.",
                    remedy="name the base that it was trained on",
                )

    def _shape(self, weight: str) -> tuple[int | None, int | None]:
        """Rows and columns of a weight as the adapter knows them; None: any."""
        stem = weight.removesuffix(".weight")
        if stem + _LOW not in self._tensors:
            return None, self._tensors[stem + _ROWS].shape[1]
        rows, columns = len(self._tensors[stem + _HIGH]), self._tensors[stem + _LOW].shape[1]
        return (columns, rows) if self._transposed else (rows, columns)

    def factors(self, weight: str) -> tuple[np.ndarray, np.ndarray]:
        """A (rank × in) and B (out × rank) of one weight, as float32. Raises `WeightsError` where single rows are trained."""
        import numpy as np

        stem = weight.removesuffix(".weight")
        if stem + _ROWS in self._tensors:
            raise WeightsError(
                f"the adapter in {self.folder} trains {len(self._row_ids[stem.rpartition('.')[2]])} rows of {weight}, which "
                "llama.cpp does not take from an adapter.",
                remedy="merge it: chaccu weights merge --gguf",
            )
        return self._tensors[stem + _LOW].astype(np.float32), self._tensors[stem + _HIGH].astype(np.float32)

    def apply(self, weight: str, values: np.ndarray) -> np.ndarray:
        """One Hugging Face weight, float32 (out × in, a Conv1D's in × out), as the adapter makes it; `values`, the base's, may
        be written to."""
        import numpy as np

        stem = weight.removesuffix(".weight")
        if stem + _ROWS in self._tensors:
            values[self._row_ids[stem.rpartition(".")[2]]] = self._tensors[stem + _ROWS]
        if stem + _LOW in self._tensors:
            low, high = self._tensors[stem + _LOW], self._tensors[stem + _HIGH]
            update = high.astype(np.float32) @ low.astype(np.float32)
            values += self.scale * (update.T if self._transposed else update)
        return values


def merge_adapter(base: Path, adapter_folder: Path, out: Path, *, progress: Progress | None = None) -> Manifest:
    """Write base + adapter as a Hugging Face folder in the base's dtype. `progress(done, total)` counts tensors.

    Raises `WeightsError` when the adapter adapts a weight that the base does not have, `StorageError` when the disk is full.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    adapter = Adapter(adapter_folder)
    check_base(base, adapter_folder)
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise WeightsError(f"{base} holds no safetensors.", remedy="name the base model's Hugging Face folder")
    require_free_space(out.parent, sum(shard.stat().st_size for shard in shards) + 64_000_000, "the merged model")
    left, done = set(adapter.weights), 0
    with atomic_folder(out) as folder:
        for shard in shards:
            tensors: dict[str, torch.Tensor] = {}
            with safe_open(shard, framework="pt") as source:
                names = list(source.keys())
                for name in names:
                    tensor = source.get_tensor(name)
                    if name in left:
                        left.remove(name)
                        tensor = torch.from_numpy(adapter.apply(name, tensor.float().numpy())).to(tensor.dtype)
                    tensors[name] = tensor
                    done += 1
                    if progress:
                        progress(done, len(names) * len(shards))
            save_file(tensors, str(folder / shard.name), metadata={"format": "pt"})
        _refuse_unknown(left, base)
        copy_files(base, folder, (*_BASE_FILES, "model.safetensors.index.json"))
        _change_config(folder / "config.json", adapter.config_changes)
        return write_manifest(folder, _manifest("model", out, base, adapter, {}))


def merge_into_gguf(gguf: Path, base: Path, adapter_folder: Path, out: Path, *, progress: Progress | None = None) -> Manifest:
    """Write a servable folder: `model.gguf` = `gguf` with the adapted tensors merged and stored as Q8_0, and the tokenizer.

    `gguf` must be the file that `base` was imported from. `progress(done, total)` counts bytes. Raises `WeightsError` or
    `StorageError`.
    """
    import gguf as ggml

    adapter = Adapter(adapter_folder)
    check_base(base, adapter_folder)
    if sha256_file(gguf) not in read_manifest(base).inputs.values():
        raise WeightsError(f"{base} was not imported from {gguf}.", remedy="name the GGUF file that weights convert read")
    file = GgufFile(gguf)
    architecture = find_architecture(file)
    hf_names = {name: architecture.hf_name(name) for name in file.tensors}
    wanted = set(adapter.weights)
    _refuse_unknown(wanted - set(hf_names.values()), base)
    adapted = {name for name, hf_name in hf_names.items() if hf_name in wanted}

    def packed(name: str) -> np.ndarray:
        hf_name = hf_names[name]
        if name not in adapted or hf_name is None:
            return file.packed(name)
        merged = gguf_values(file, name, adapter.apply(hf_name, hf_tensor(file, name)))
        return ggml.quants.quantize(merged, ggml.GGMLQuantizationType.Q8_0)

    table = [(entry.name, entry.shape, _Q8_0 if entry.name in adapted else entry.type_id) for entry in file.tensors.values()]
    require_free_space(out.parent, 2 * gguf.stat().st_size, "the merged GGUF model")
    with atomic_folder(out) as folder:
        with (folder / "model.gguf").open("wb") as target:
            pairs = stretch_pairs(file, adapter.config_changes)
            for done in write_gguf(target, pairs=pairs, tensors=table, packed=packed, alignment=file.alignment):
                if progress:
                    progress(done, gguf.stat().st_size)
        copy_files(base, folder, TOKENIZER_FILES)
        return write_manifest(folder, _manifest("gguf", out, base, adapter, {gguf.name: sha256_file(gguf)}))


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


def _change_config(file: Path, changes: dict[str, Any]) -> None:
    """Give a model's config the values that the adapter was trained with, where they are not the base's."""
    if not changes:
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    text.pop("rope_scaling", None)  # the older name, which stands before rope_parameters where both are there
    text.update(changes)
    write_json(file, config)


def _refuse_unknown(weights: set[str], base: Path) -> None:
    if weights:
        raise WeightsError(f"the adapter changes {sorted(weights)[0]} and {len(weights) - 1} more that {base} does not have.")


def _manifest(kind: str, out: Path, base: Path, adapter: Adapter, inputs: dict[str, str]) -> Manifest:
    folders = {"base": base, "adapter": adapter.folder}
    named = {role: folder for role, folder in folders.items() if (folder / MANIFEST_NAME).is_file()}
    origin = read_manifest(named["adapter"]) if "adapter" in named else None
    return Manifest(
        kind=kind,
        name=out.name,
        chat_format=origin.chat_format if origin else None,
        tokenizer_sha256=origin.tokenizer_sha256 if origin else None,
        license=read_manifest(base).license if "base" in named else None,
        parents={role: manifest_sha256(folder) for role, folder in named.items()},
        inputs=inputs,
        settings={"adapted_weights": len(adapter.weights)},
        versions=library_versions("safetensors", "gguf"),
    )
