"""A PEFT LoRA adapter's folder, opened for reading: which weights of a base it changes, and what it makes of them.

An adapter's update of a weight W (out × in) is ΔW = alpha / rank · B·A (Hu et al. 2021, arXiv:2106.09685); the rows of single
tokens that it trained take the place of the base's.

Invariants: a factor is read when its weight's turn comes, in whatever dtype it lies, and reckoned with in float32; a factor
that is not finite is an error. DoRA, bias terms and patterns of ranks are refused by name.

Tensor names: O outputs, I inputs, R rank; a Conv1D's weight lies as I × O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chaccu.artifact import MANIFEST_NAME, read_manifest
from chaccu.errors import WeightsError
from chaccu.weights.checkpoint import require_finite
from chaccu.weights.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    import numpy as np

_PREFIX = "base_model.model."
_LOW, _HIGH, _ROWS = ".lora_A.weight", ".lora_B.weight", ".token_adapter.trainable_tokens_delta"


class Adapter:
    """An adapter folder. Raises `WeightsError` when it is none, is damaged, or is of an unknown kind.

    `weights`: names of the base's weights that it changes; `scale`: alpha / rank; `config_changes`: values of the base's config
    that differ in training (stretched positions), and so in the merged model.
    """

    def __init__(self, folder: Path) -> None:
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
        self._row_ids: dict[str, list[int]] = config.get("trainable_token_indices") or {}
        self._file = SafetensorsFile(weights_file)
        self._names = {name.removeprefix(_PREFIX): name for name in self._file.entries}
        self._check_names()
        self.weights = sorted(
            {name.removesuffix(ending) + ".weight" for name in self._names for ending in (_LOW, _ROWS) if name.endswith(ending)}
        )
        if not self.weights:
            raise WeightsError(f"{folder} holds no weights of a LoRA adapter.", remedy="name the output folder of chaccu train")

    def _check_names(self) -> None:
        for name in self._names:
            if not name.endswith((_LOW, _HIGH, _ROWS)):
                raise WeightsError(f"{self.folder} holds {name}, which merging does not know.")
            pair = {_LOW: _HIGH, _HIGH: _LOW}.get(next(ending for ending in (_LOW, _HIGH, _ROWS) if name.endswith(ending)))
            other = name.removesuffix(_LOW).removesuffix(_HIGH) + pair if pair else name
            if other not in self._names:
                raise WeightsError(f"{self.folder} holds {name} without {other}.", remedy="train it again")

    def check_finite(self) -> None:
        """Raise `WeightsError` when a factor holds NaN or infinity."""
        for name in self._names:
            self._read(name)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]], base: Path) -> None:
        """Raise `WeightsError` unless `shapes`, those of the weights in `base`, have every weight that the adapter changes, in
        its shape.
        """
        missing = [weight for weight in self.weights if weight not in shapes]
        if missing:
            raise WeightsError(f"the adapter changes {missing[0]} and {len(missing) - 1} more that {base} does not have.")
        for weight in self.weights:
            wanted, found = self._shape(weight), shapes[weight]
            if len(found) != 2 or any(want not in (None, have) for want, have in zip(wanted, found, strict=True)):
                raise WeightsError(
                    f"{weight} is {' × '.join(map(str, found))} in {base}, and the adapter in {self.folder} is for another "
                    f"shape: {' × '.join('any' if one is None else str(one) for one in wanted)}.",
                    remedy="name the base that it was trained on",
                )

    def _shape(self, weight: str) -> tuple[int | None, int | None]:
        """Rows and columns of a weight as the adapter knows them; None: any."""
        stem = weight.removesuffix(".weight")
        if stem + _LOW not in self._names:
            return None, self._entry_shape(stem + _ROWS)[1]
        rows, columns = self._entry_shape(stem + _HIGH)[0], self._entry_shape(stem + _LOW)[1]
        return (columns, rows) if self._transposed else (rows, columns)

    def _entry_shape(self, name: str) -> tuple[int, ...]:
        return self._file.entries[self._names[name]].shape

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._file.read(self._names[name])
        require_finite(tensor, name, self.folder)
        return tensor.float()

    def factors(self, weight: str) -> tuple[np.ndarray, np.ndarray]:
        """A (rank × in) and B (out × rank) of one weight, as float32. Raises `WeightsError` where single rows are trained."""
        stem = weight.removesuffix(".weight")
        if stem + _ROWS in self._names:
            raise WeightsError(
                f"the adapter in {self.folder} trains {len(self._row_ids[stem.rpartition('.')[2]])} rows of {weight}, which "
                "llama.cpp does not take from an adapter.",
                remedy="merge it: chaccu weights merge --gguf",
            )
        return self._read(stem + _LOW).numpy(), self._read(stem + _HIGH).numpy()

    def change(self, weight: str) -> WeightChange:
        """What becomes of one of `weights`; its factors are read now."""
        stem = weight.removesuffix(".weight")
        change = WeightChange(self.scale)
        if stem + _ROWS in self._names:
            change.row_ids = torch.tensor(self._row_ids[stem.rpartition(".")[2]])
            change.row_values = self._read(stem + _ROWS)
        if stem + _LOW in self._names:
            low_RI, high_OR = self._read(stem + _LOW), self._read(stem + _HIGH)
            change.left, change.right = (low_RI.T, high_OR.T) if self._transposed else (high_OR, low_RI)
        return change


class WeightChange:
    """The change of one weight: `left` · `right` times `scale` is added, after `row_values` have taken the place of the rows
    `row_ids`.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.left: torch.Tensor | None = None
        self.right: torch.Tensor | None = None
        self.row_ids: torch.Tensor | None = None
        self.row_values: torch.Tensor | None = None

    def apply(self, begin: int, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of the base's weight (float32, the first of them is row `begin`), as the adapter makes them: new memory."""
        end = begin + len(rows)
        if self.row_ids is not None and self.row_values is not None:
            inside = (self.row_ids >= begin) & (self.row_ids < end)
            rows = rows.index_copy(0, self.row_ids[inside] - begin, self.row_values[inside])
        if self.left is not None and self.right is not None:
            rows = torch.addmm(rows, self.left[begin:end], self.right, alpha=self.scale)
        return rows
