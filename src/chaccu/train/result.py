"""A run's result, and its snapshots: the model as an artifact folder.

Invariants: a folder appears whole or not at all; a model's weights lie in it in the precision that they were computed with,
which is what the held-out losses were measured in, and `config.json` says so; an adapter's base is named as in the recipe.
"""

from __future__ import annotations

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
    require_free_space,
    weights_sha256,
    write_manifest,
)
from chaccu.conversation import TOKENIZER_FILES, ChatFormat, TextTokenizer
from chaccu.train.model import TrainableModel
from chaccu.train.recipe import Recipe
from chaccu.train.trackers import RunFolder

_LIBRARIES = ("torch", "transformers", "peft", "tokenizers")
_CONFIG_NAME = "config.json"
# Tokenizer, logs and what else a folder holds beside the weights.
_OTHER_BYTES = 64_000_000


class ResultWriter:
    """Writes the model of one run as it is at the time. `inputs`: SHA-256 of the data by path."""

    def __init__(
        self,
        model: TrainableModel,
        recipe: Recipe,
        base: Path,
        chat_format: ChatFormat,
        tokenizer: TextTokenizer,
        inputs: dict[str, str],
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._base = base
        self._format = chat_format.name
        self._tokenizer = tokenizer
        self._inputs = inputs
        # An adapter's own weights are few, and stay float32.
        self._dtype = None if recipe.trains_adapter else model.dtype

    def require_space(self) -> None:
        """Raise `StorageError` unless there is room for the result, and for the snapshots, of which there is one more while the
        oldest is not yet removed."""
        count = 1 if self._recipe.save_steps is None else self._recipe.save_total_limit + 2
        weight_bytes = 4 if self._dtype is None else self._dtype.itemsize
        size = weight_bytes * sum(parameter.numel() for parameter in self._model.parameters) + _OTHER_BYTES
        what = "the result" if count == 1 else "the result with its snapshots"
        require_free_space(Path(self._recipe.output).parent, count * size, what)

    def write(self, path: Path, facts: dict[str, Any], logs: RunFolder | None = None) -> None:
        """The model, its tokenizer and a manifest with `facts`, and `logs` where they are given. All processes have to call it,
        and the first one writes. Raises `StorageError`."""
        model, recipe = self._model, self._recipe
        weights = model.gather_weights(dtype=self._dtype, trained_only=recipe.trains_adapter)
        if not model.processes.first:
            return
        options: dict[str, Any] = {} if weights is None else {"state_dict": weights}
        if recipe.trains_adapter:
            # Where the base was found on this machine means nothing elsewhere.
            model.full.peft_config["default"].base_model_name_or_path = recipe.model
            # By itself peft asks the hub whether the base has other embeddings than it was made with.
            options["save_embedding_layers"] = False
        with atomic_folder(path) as folder:
            model.full.save_pretrained(str(folder), **options)
            # peft's model card, all of whose fields are empty.
            (folder / "README.md").unlink(missing_ok=True)
            if self._dtype is not None:
                _write_dtype(folder / _CONFIG_NAME, self._dtype)
            copy_files(self._base, folder, TOKENIZER_FILES)
            if logs is not None:
                logs.copy_to(folder / "logs")
            write_manifest(folder, self._describe(path, facts))

    def _describe(self, path: Path, facts: dict[str, Any]) -> Manifest:
        output, base = Path(self._recipe.output), self._base
        parents, base_weights = {}, {}
        if (base / MANIFEST_NAME).is_file():
            parents = {"base": manifest_sha256(base)}
            # What tells the base on another machine, where its manifest may have another hash.
            base_weights = {"base_weights": weights_sha256(read_manifest(base))}
        return Manifest(
            kind="adapter" if self._recipe.trains_adapter else "model",
            name=output.name if path == output else f"{output.name}-{path.name}",
            chat_format=self._format,
            tokenizer_sha256=self._tokenizer.sha256,
            parents=parents,
            inputs=self._inputs,
            settings=msgspec.to_builtins(self._recipe),
            facts={**facts, **base_weights},
            versions=library_versions(*_LIBRARIES, *(["bitsandbytes"] if self._model.packing else [])),
        )


def _write_dtype(config: Path, dtype: torch.dtype) -> None:
    """Let `config.json` name the weights' dtype; transformers writes that of the model in memory."""
    fields = msgspec.json.decode(config.read_bytes(), type=dict[str, Any])
    name = str(dtype).removeprefix("torch.")
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    config.write_bytes(msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n")
