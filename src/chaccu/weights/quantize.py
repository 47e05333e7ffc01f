"""A model in fewer bits: which form a type stands for, which source it takes, and what the model is worth before and after.

Invariant: what is written is whole before it is measured; measuring changes nothing of it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import torch

from chaccu.artifact import Manifest, storage_errors
from chaccu.conversation import TextTokenizer
from chaccu.errors import UsageError, WeightsError, did_you_mean
from chaccu.hub import find_model_folder
from chaccu.weights.checkpoint import MAX_SHARD_BYTES, Checkpoint, Progress
from chaccu.weights.gguf_export import FILE_NAME as EXPORTED_FILE
from chaccu.weights.gguf_export import export_gguf
from chaccu.weights.gguf_import import import_gguf
from chaccu.weights.model_files import describe_source
from chaccu.weights.perplexity import (
    STRIDE,
    Perplexity,
    foretelling,
    load_model,
    measure_perplexity,
    measure_speed,
    window_of,
)
from chaccu.weights.quantize_gguf import GGUF_TYPES, quantize_gguf
from chaccu.weights.quantize_hf import HF_TYPES, quantize_hf

TYPES = (*GGUF_TYPES, *HF_TYPES)
_EXPORTED = {torch.float32: "f32", torch.bfloat16: "bf16"}
_INT4 = (
    "torchao's int4 weights are packed by the kernels of one GPU, and those for a CPU go into pickles alone, which "
    "transformers no longer loads"
)


class Measured(msgspec.Struct, frozen=True):
    """A model's weights: bytes, what they foretell of the text, by whose reckoning, and tokens generated a second (None: no
    engine here runs it)."""

    size_bytes: int
    measured_by: str = ""
    perplexity: Perplexity | None = None
    tokens_per_s: float | None = None


def check_type(kind: str) -> None:
    """Raise `UsageError` unless `kind` is one of `TYPES`."""
    if kind == "int4":
        raise UsageError(f"there is no type int4: {_INT4}.", remedy="nf4 for transformers, q4_k_m for llama.cpp")
    if kind not in TYPES:
        raise UsageError(f"there is no type {kind!r}.", remedy=did_you_mean(kind, TYPES))


def find_source(source: str | Path, kind: str) -> Path:
    """What is quantised into `kind`: a Hugging Face folder, downloaded where `source` is a hub id, or, for a GGUF type, the
    GGUF file that the folder holds or that is named.

    Raises `WeightsError` when it is of the other form, or not there.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = find_model_folder(source, error=WeightsError)
    ggufs = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if kind in HF_TYPES:
        if not (path / "config.json").is_file():
            raise WeightsError(
                f"{source} is no Hugging Face folder, which {kind} needs.",
                remedy="chaccu weights convert makes one of a GGUF file",
            )
        return path
    if len(ggufs) > 1 and (path / "model.gguf").is_file():
        return path / "model.gguf"
    if not ggufs and (path / "config.json").is_file():
        return path
    if len(ggufs) != 1:
        names = ", ".join(file.name for file in ggufs) or "none"
        raise WeightsError(f"{source} holds no single GGUF file: {names}.", remedy="name the file to quantise")
    return ggufs[0]


def quantize(
    source: Path, out: Path, kind: str, *, max_shard_bytes: int = MAX_SHARD_BYTES, progress: Progress | None = None
) -> Manifest:
    """Write what `find_source` found in `kind`; raises as `quantize_gguf` and `quantize_hf`."""
    check_type(kind)
    if kind in GGUF_TYPES and source.is_dir():
        return _quantize_exported(source, out, kind, progress)
    if kind in GGUF_TYPES:
        return quantize_gguf(source, out, kind, progress=progress)
    return quantize_hf(source, out, kind, max_shard_bytes=max_shard_bytes, progress=progress)


def _quantize_exported(source: Path, out: Path, kind: str, progress: Progress | None) -> Manifest:
    """A Hugging Face folder by way of a GGUF file in its own dtype, which is gone afterwards."""
    checkpoint = Checkpoint(source)
    largest = max(checkpoint.entries.values(), key=lambda entry: entry.size_bytes)
    with storage_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".exported-", dir=out.parent) as scratch:
        exported = Path(scratch) / "gguf"
        export_gguf(source, exported, kind=_EXPORTED.get(largest.dtype, "f16"), progress=progress)
        origin = describe_source(source, checkpoint, "source")
        return quantize_gguf(exported / EXPORTED_FILE, out, kind, origin=origin, progress=progress)


def measure_size(model: Path) -> int:
    """Bytes of a GGUF file, or of the tensors of a Hugging Face folder."""
    return model.stat().st_size if model.is_file() else Checkpoint(model).size_bytes


def measure_model(model: Path, text: str, *, progress: Progress | None = None) -> Measured:
    """What a GGUF file or a Hugging Face folder is worth on `text`.

    The binding of llama.cpp tells no likelihoods of a prompt: a GGUF file is unpacked beside itself, in float32, and what its
    weights stand for is measured by transformers; its speed is not.
    """
    if model.is_dir():
        return _measure_folder(model, model, text, timed=True, progress=progress)
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=model.parent) as scratch:
        unpacked = Path(scratch) / "model"
        import_gguf(model, unpacked, chat_format="chatml", dtype="float32")
        return _measure_folder(model, unpacked, text, timed=False, progress=progress)


def _measure_folder(model: Path, folder: Path, text: str, *, timed: bool, progress: Progress | None) -> Measured:
    loaded = load_model(folder)
    window = window_of(loaded)
    perplexity = measure_perplexity(
        foretelling(loaded),
        TextTokenizer.load(folder),
        text,
        window=window,
        stride=min(STRIDE, max(1, window // 2)),
        progress=progress,
    )
    by = "transformers" if timed else "transformers, with the file's weights unpacked"
    return Measured(measure_size(model), by, perplexity, measure_speed(loaded) if timed else None)
