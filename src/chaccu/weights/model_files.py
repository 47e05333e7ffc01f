"""What lies beside the weights in a model's Hugging Face folder: its config, its tokenizer, and what is said of where it came
from.

It ignores the weights themselves (`checkpoint`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chaccu.artifact import MANIFEST_NAME, Manifest, manifest_sha256, read_manifest
from chaccu.conversation import TOKENIZER_FILES
from chaccu.errors import WeightsError
from chaccu.hub import MODEL_FILES as HUB_FILES
from chaccu.hub import fetch_model, find_model_folder
from chaccu.lineage import find_tokenizer_sha256, source_inputs, source_parents
from chaccu.weights.checkpoint import Checkpoint

# Tokenizers of older forms come along, for whoever reads those.
_OLDER_TOKENIZERS = ("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
MODEL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES, *_OLDER_TOKENIZERS)
# Model types whose linear weights lie as in × out (transformers' Conv1D).
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt"})


def find_model(name: str | Path, *, pickled: bool = False) -> Path:
    """The folder of a model named by its path or hub id. Raises `WeightsError` when there is none.

    `pickled`: whoever asks reads PyTorch's pickles too, and the hub's are fetched where it has no safetensors.
    """
    files = (*HUB_FILES, "tokenizer.model", "merges.txt")
    folder = find_model_folder(name, error=WeightsError, files=files)
    if pickled and not any(folder.glob("*.safetensors")) and not Path(name).expanduser().is_dir():
        return fetch_model(str(name), error=WeightsError, files=(*files, "pytorch_model*.bin"))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config. Raises `WeightsError` when it is missing or damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} has no config.json.", remedy="name a model's Hugging Face folder")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path} is damaged ({error}).", remedy=f"chaccu weights repair {folder}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is damaged: it is no object.", remedy=f"chaccu weights repair {folder}")
    return config


def require_whole_weights(folder: Path, config: dict[str, Any]) -> None:
    """Raise `WeightsError` when the model is quantised: its tensors are no weights to reckon with, but codes and scales."""
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise WeightsError(f"the weights in {folder} are quantised ({method}).", remedy="name the model that was quantised")


def has_conv1d(config: dict[str, Any]) -> bool:
    """Whether the model's linear weights lie turned over, as in × out."""
    return config.get("model_type") in _CONV1D_MODELS


def describe_source(folder: Path, checkpoint: Checkpoint | None, role: str) -> Manifest:
    """What something made of a model's folder carries over: chat format, tokenizer, licence, and what it was made of: the
    folder's manifest as the parent `role` ("source" of a copy in fewer bits, with the weights' hashes as inputs), or, without
    one, its files of weights as inputs.
    """
    if (folder / MANIFEST_NAME).is_file():
        origin = read_manifest(folder)
        return Manifest(
            kind="model",
            name=origin.name,
            chat_format=origin.chat_format,
            tokenizer_sha256=origin.tokenizer_sha256,
            license=origin.license,
            parents=source_parents(folder, origin) if role == "source" else {role: manifest_sha256(folder)},
            inputs=source_inputs(folder, origin) if role == "source" else {},
        )
    inputs = checkpoint.sha256() if checkpoint is not None else {}
    tokenizer = find_tokenizer_sha256(folder) if (folder / "tokenizer.json").is_file() else None
    return Manifest(kind="model", name=folder.name, tokenizer_sha256=tokenizer, inputs=inputs)
