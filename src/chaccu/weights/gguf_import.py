"""GGUF → Hugging Face folder: config, safetensors, tokenizer and manifest.

Invariants: tensors pass one at a time; an architecture that is not in `gguf_architectures` is refused by name.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from chaccu.artifact import Manifest, atomic_folder, library_versions, sha256_file, write_json, write_manifest
from chaccu.conversation import TextTokenizer
from chaccu.weights.checkpoint import MAX_SHARD_BYTES, Progress, write_checkpoint
from chaccu.weights.gguf_architectures import find_architecture
from chaccu.weights.gguf_file import GgufFile
from chaccu.weights.gguf_tensors import unpack_tensor
from chaccu.weights.gguf_tokenizer import read_tokenizer
from chaccu.weights.safetensors_file import TensorSpec
from chaccu.weights.token_identity import Template, find_format, put_template, settle_template


def import_gguf(
    source: Path,
    out: Path,
    *,
    chat_format: str,
    dtype: str = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Write `source` as a Hugging Face folder at `out` (config, safetensors, tokenizer, manifest), atomically.

    `dtype`: torch's name of it. `progress(done, total)` counts bytes. Raises `WeightsError` for an unknown architecture, a
    damaged file or a value that `dtype` does not hold, `StorageError` when the disk is full.
    """
    import torch

    file = GgufFile(source)
    architecture = find_architecture(file)
    target = getattr(torch, dtype)
    names = {hf_name: name for name in file.tensors if (hf_name := architecture.hf_name(name)) is not None}
    specs = [TensorSpec(hf_name, target, file.tensors[name].shape) for hf_name, name in names.items()]
    parameters = sum(math.prod(spec.shape) for spec in specs)
    tokenizer, tokenizer_config = read_tokenizer(file)
    with atomic_folder(out) as folder:
        written = write_checkpoint(
            folder,
            specs,
            lambda hf_name: unpack_tensor(file, names[hf_name], target),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        write_json(folder / "config.json", {**architecture.read_config(file), "dtype": dtype})
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2), encoding="utf-8")
        made = TextTokenizer.load(folder)
        own = file.get("tokenizer.chat_template")
        if own:
            put_template(folder, Template(own, "format"))
        put_template(folder, settle_template(own, made, find_format(chat_format, folder)))
        return write_manifest(
            folder,
            Manifest(
                kind="base",
                name=str(file.get("general.name", source.stem)),
                chat_format=chat_format,
                tokenizer_sha256=made.sha256,
                license=file.get("general.license"),
                inputs={source.name: sha256_file(source)},
                settings={"dtype": dtype, "architecture": file.architecture},
                facts={"parameters": parameters},
                versions=library_versions("gguf", "safetensors", "tokenizers"),
            ),
            hashed=written,
        )
