"""A LoRA adapter out of two full models: each linear layer's change as a product of low rank.

ΔW ≈ B·A (Hu et al. 2021, arXiv:2106.09685, read backwards) by singular value decomposition, see `low_rank`. The adapter is a
folder as training writes it, in PEFT's form with alpha = rank, so that merging and serving take it. Invariant: what an adapter
cannot hold, and what its rank leaves out, is reported: the energy kept is 1 − ‖Δ − B·A‖² / ‖Δ‖².
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import torch

from chaccu.artifact import Manifest, atomic_folder, copy_files, library_versions, write_json, write_manifest
from chaccu.conversation import TOKENIZER_FILES
from chaccu.errors import UsageError, WeightsError
from chaccu.lineage import identify_weights
from chaccu.weights.checkpoint import Progress, write_checkpoint
from chaccu.weights.low_rank import factorize, squared_singular_values
from chaccu.weights.model_comparison import Comparison, square_sum
from chaccu.weights.model_files import describe_source
from chaccu.weights.safetensors_file import TensorSpec

_WEIGHTS_NAME, _CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
_PREFIX, _LOW, _HIGH = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class ModuleKept(msgspec.Struct, frozen=True):
    """Layers of one name: `share` of the whole change, and `energy_kept` of theirs."""

    module: str
    layers: int
    share: float
    energy_kept: float


class LossShare(msgspec.Struct, frozen=True):
    """Changed tensors of one kind that the adapter does not hold, and their share of the whole change."""

    kind: str
    tensors: list[str]
    share: float


class ExtractReport(msgspec.Struct, frozen=True):
    """What an adapter keeps of a change: `layers_energy_kept` of that of its layers, `energy_kept` of the whole."""

    rank: int
    modules: list[ModuleKept]
    layers_energy_kept: float
    energy_kept: float
    lost: list[LossShare]
    differences: list[str]


def require_nothing_lost(comparison: Comparison) -> None:
    """Raise `WeightsError` naming what has changed and is no linear layer's weight."""
    parts = []
    for loss in comparison.losses:
        more = f" and {len(loss.tensors) - 1} more" if len(loss.tensors) > 1 else ""
        parts.append(f"{loss.kind}: {loss.tensors[0]}{more}, {loss.change / comparison.change:.2%} of the change")
    if parts or comparison.differences:
        raise WeightsError(
            f"an adapter does not hold all that differs between {comparison.tuned.folder} and {comparison.base.folder}: "
            f"{'; '.join([*parts, *comparison.differences])}.",
            remedy="chaccu weights delta-make, which keeps everything, or leave out --strict",
        )


def choose_rank(comparison: Comparison, energy: float, *, progress: Progress | None = None) -> int:
    """The smallest rank, one for all layers, that keeps the share `energy` of their change. `progress(done, total)` counts
    layers.

    Raises `UsageError` when `energy` is not between 0 and 1.
    """
    if not 0 < energy < 1:
        raise UsageError(f"--energy is {energy:g}; it must be between 0 and 1.", remedy="--energy 0.9")
    kept = torch.zeros(1, dtype=torch.float64)
    total = 0.0
    for done, layer in enumerate(comparison.layers, 1):
        values = squared_singular_values(comparison.difference(layer.name))
        total += float(values.sum())
        longer, shorter = (values, kept) if len(values) > len(kept) else (kept, values)
        kept = longer.clone()
        kept[: len(shorter)] += shorter
        if progress:
            progress(done, len(comparison.layers))
    return int(torch.searchsorted(kept.cumsum(0), energy * total)) + 1


def extract_adapter(
    comparison: Comparison, rank: int, out: Path, *, base_name: str | None = None, progress: Progress | None = None
) -> tuple[Manifest, ExtractReport]:
    """Write the adapter of that rank. `base_name`: what its config calls the base; else its manifest's or its folder's name.

    `progress(done, total)` counts bytes of the adapter. Raises `WeightsError`, or `StorageError` when the disk is full.
    """
    if rank < 1:
        raise UsageError(f"--rank is {rank}; it must be 1 or more.")
    base, tuned = comparison.base.folder, comparison.tuned.folder
    parent, origin = describe_source(base, None, "base"), describe_source(tuned, comparison.tuned, "tuned")
    name = base_name or parent.name
    modules = sorted({layer.module for layer in comparison.layers})
    factors = _Factors(comparison, rank)
    with atomic_folder(out) as folder:
        specs = factors.specs()
        written = write_checkpoint(folder, specs, factors.read, shards={_WEIGHTS_NAME: specs}, progress=progress)
        write_json(folder / _CONFIG_NAME, _peft_config(rank, modules, name, transposed=comparison.transposed))
        copy_files(base, folder, TOKENIZER_FILES)
        report = factors.report()
        manifest = Manifest(
            kind="adapter",
            name=out.name,
            chat_format=origin.chat_format or parent.chat_format,
            # The one it is to be used with: rows that another has lie in the embeddings, which stay the base's.
            tokenizer_sha256=parent.tokenizer_sha256,
            license=origin.license or parent.license,
            parents={**parent.parents, **origin.parents},
            inputs=origin.inputs,
            settings={"rank": rank, "target_modules": modules},
            facts={"base_name": name, "base_weights": identify_weights(base), "extracted": msgspec.to_builtins(report)},
            versions=library_versions("torch"),
        )
        return write_manifest(folder, manifest, hashed=written), report


def _peft_config(rank: int, modules: list[str], base_name: str, *, transposed: bool) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }


class _Factors:
    """The adapter's tensors, A before B of each layer, computed when their turn comes; and what they left out."""

    def __init__(self, comparison: Comparison, rank: int) -> None:
        self._comparison = comparison
        self._rank = rank
        self._layers = {_PREFIX + layer.name.removesuffix(".weight"): layer for layer in comparison.layers}
        self._high: torch.Tensor | None = None
        self._left: dict[str, float] = {}

    def specs(self) -> list[TensorSpec]:
        found = []
        for stem, layer in self._layers.items():
            rows, columns = self._comparison.base.entries[layer.name].shape[:: -1 if self._comparison.transposed else 1]
            found.append(TensorSpec(stem + _LOW, torch.float32, (self._rank, columns)))
            found.append(TensorSpec(stem + _HIGH, torch.float32, (rows, self._rank)))
        return found

    def read(self, name: str) -> torch.Tensor:
        if name.endswith(_HIGH):
            high, self._high = self._high, None
            assert high is not None
            return high
        layer = self._layers[name.removesuffix(_LOW)]
        difference = self._comparison.difference(layer.name)
        low, self._high = factorize(difference, self._rank)
        self._left[layer.name] = square_sum(difference.addmm_(self._high, low, alpha=-1))
        return low

    def report(self) -> ExtractReport:
        whole = self._comparison.change
        groups: dict[str, list[tuple[float, float]]] = {}
        for layer in self._comparison.layers:
            groups.setdefault(layer.module, []).append((layer.change, self._left[layer.name]))
        modules = []
        for module, pairs in groups.items():
            change, left = (math.fsum(values) for values in zip(*pairs, strict=True))
            modules.append(ModuleKept(module, len(pairs), change / whole, 1 - left / change))
        changed, left = math.fsum(layer.change for layer in self._comparison.layers), math.fsum(self._left.values())
        lost = [LossShare(loss.kind, loss.tensors, loss.change / whole) for loss in self._comparison.losses]
        return ExtractReport(
            rank=self._rank,
            modules=modules,
            layers_energy_kept=1 - left / changed,
            energy_kept=(changed - left) / whole,
            lost=lost,
            differences=self._comparison.differences,
        )
