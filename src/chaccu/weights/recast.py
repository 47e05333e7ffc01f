"""A Hugging Face folder in another dtype, or in files of another size.

Invariants: tensors pass one at a time; integers stay as they are; a value that the dtype does not hold is an error that names
its tensor; the tokenizer is the one that training saw (`token_identity`).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from chaccu.artifact import (
    Manifest,
    atomic_folder,
    copy_files,
    library_versions,
    manifest_sha256,
    weights_sha256,
    write_json,
    write_manifest,
)
from chaccu.conversation import TextTokenizer, read_template
from chaccu.weights.checkpoint import MAX_SHARD_BYTES, Checkpoint, Progress, require_finite, write_checkpoint
from chaccu.weights.gguf_tensors import narrow
from chaccu.weights.model_files import MODEL_FILES
from chaccu.weights.safetensors_file import TensorSpec
from chaccu.weights.token_identity import find_format, put_template, settle_template, trained_manifest

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def recast_model(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    chat_format: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the model in `source` as `out`, its floating-point tensors in `dtype` (a key of `DTYPES`; None: as they are),
    atomically.

    `progress(done, total)` counts bytes. Raises `WeightsError` for a value that is not finite or becomes so, `StorageError`
    when the disk is full.
    """
    checkpoint = Checkpoint(source)
    trained = trained_manifest(source)
    named = chat_format or (trained.chat_format if trained else None)
    tokenizer = TextTokenizer.load(source)
    template = settle_template(read_template(source), tokenizer, find_format(named, source))
    target = DTYPES[dtype] if dtype else None
    specs = [
        TensorSpec(name, target if target and entry.dtype.is_floating_point else entry.dtype, entry.shape)
        for name, entry in checkpoint.entries.items()
    ]
    wanted = {spec.name: spec.dtype for spec in specs}

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.read(name)
        require_finite(tensor, name, source)
        return tensor if tensor.dtype == wanted[name] else narrow(tensor, wanted[name], name)

    with atomic_folder(out) as folder:
        written = write_checkpoint(folder, specs, read, max_shard_bytes=max_shard_bytes, progress=progress)
        copy_files(source, folder, (*MODEL_FILES, "LICENSE"))
        put_template(folder, template)
        if target is not None:
            _name_dtype(folder / "config.json", target)
        return write_manifest(
            folder,
            Manifest(
                kind=trained.kind if trained else "base",
                name=trained.name if trained else source.resolve().name,
                chat_format=named,
                tokenizer_sha256=tokenizer.sha256,
                license=trained.license if trained else None,
                parents={trained.kind: manifest_sha256(source)} if trained else {},
                inputs=(weights_sha256(trained) if trained else {}) or checkpoint.sha256(),
                settings={"dtype": dtype, "max_shard_bytes": max_shard_bytes},
                facts={**(trained.facts if trained else {}), "chat_template": template.origin},
                versions=library_versions("torch", "safetensors"),
            ),
            hashed=written,
        )


def _name_dtype(file: Path, dtype: torch.dtype) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)  # the older name
    config["dtype"] = name
    write_json(file, config)
