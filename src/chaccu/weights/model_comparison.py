"""What training changed in a model: of each tensor, how much; which of them a low-rank adapter can hold, and what it cannot.

How much is ‖Δ‖², the sum of squares of tuned − base, taken in float32 and summed in float64; a row or a tensor that only one of
the two has counts as a change from zero, or to it.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch

from chaccu.errors import WeightsError
from chaccu.weights.checkpoint import Checkpoint, Progress
from chaccu.weights.model_difference import find_config_difference, find_tokenizer_difference
from chaccu.weights.model_files import has_conv1d, read_config, require_whole_weights
from chaccu.weights.safetensors_file import TensorSpec
from chaccu.weights.tensor_stream import TensorReader, read_together

_IN_A_LAYER = re.compile(r".*\.\d+\..*\.weight|h\.\d+\..*\.weight")
_HEAD = "lm_head.weight"
_EMBEDDINGS = re.compile(r".*(embed|wte|wpe|lm_head).*")
_NORMS = re.compile(r".*(norm|ln_\w+)\..*")


class Layer(msgspec.Struct, frozen=True):
    """A linear layer by the name of its weight; `change` is ‖Δ‖²."""

    name: str
    change: float

    @property
    def module(self) -> str:
        """The last word of its name: `q_proj`, `down_proj`."""
        return self.name.split(".")[-2]


class Loss(msgspec.Struct, frozen=True):
    """What an adapter leaves out: a kind of tensor, how many have changed, their ‖Δ‖² and its share of the whole change."""

    kind: str
    tensors: list[str]
    change: float


class Comparison:
    """Two models side by side. `layers`: those that an adapter is for; `losses`: what else has changed; `differences`: in
    words, what differs in config and tokenizer; `transposed`: the layers' weights lie as in × out.

    `progress(done, total)` counts bytes. Raises `WeightsError` when the models are of other shapes, damaged, not finite or
    equal.
    """

    def __init__(self, base: Path, tuned: Path, *, progress: Progress | None = None) -> None:
        self.base, self.tuned = Checkpoint(base), Checkpoint(tuned)
        config, tuned_config = read_config(base), read_config(tuned)
        require_whole_weights(base, config)
        require_whole_weights(tuned, tuned_config)
        self.transposed = has_conv1d(config)
        found = [find_config_difference(config, tuned_config), find_tokenizer_difference(base, tuned)]
        self.differences = [difference for difference in found if difference]
        changes = self._measure_all(progress)
        linear = {name for name in changes if self._is_linear(name, tied=bool(config.get("tie_word_embeddings")))}
        layers = [Layer(name, change) for name, change in changes.items() if name in linear]
        # An adapter is for every layer of a name, or for none.
        changed = {layer.module for layer in layers if layer.change}
        self.layers = [layer for layer in layers if layer.module in changed]
        if not self.layers:
            raise WeightsError(
                f"no linear layer of {tuned} differs from that of {base}.", remedy="name a model trained from the base"
            )
        self.losses = _group({name: change for name, change in changes.items() if change and name not in linear})
        self.change = math.fsum(changes.values())

    def difference(self, name: str) -> torch.Tensor:
        """tuned − base of a layer (out × in), float32."""
        entry = self.base.entries[name]
        result = torch.empty(entry.shape, dtype=torch.float32)
        flat = result.view(-1)
        with ThreadPoolExecutor(2) as executor:
            readers = [TensorReader(checkpoint, name, finite=False, hashed=False) for checkpoint in (self.tuned, self.base)]
            for start, (new, old) in read_together(readers, executor):
                torch.sub(new.float(), old.float(), out=flat[start : start + len(new)])
        return result.T if self.transposed else result

    def _measure_all(self, progress: Progress | None) -> dict[str, float]:
        changes: dict[str, float] = {}
        total = max(self.base.size_bytes, self.tuned.size_bytes)
        done = 0
        with ThreadPoolExecutor(2) as executor:
            for name in {**self.base.entries, **self.tuned.entries}:
                entries = [checkpoint.entries[name] for checkpoint in (self.base, self.tuned) if name in checkpoint.entries]
                self._check_shapes(entries)
                changes[name] = self._measure(name, executor)
                done += max(entry.size_bytes for entry in entries)
                if progress:
                    progress(min(done, total), total)
        return changes

    def _check_shapes(self, entries: list[TensorSpec]) -> None:
        old, new = entries[0], entries[-1]
        if len(old.shape) != len(new.shape) or old.shape[1:] != new.shape[1:]:
            shapes = [" × ".join(map(str, entry.shape)) for entry in (old, new)]
            raise WeightsError(
                f"{old.name} is {shapes[0]} in {self.base.folder} and {shapes[1]} in {self.tuned.folder}.",
                remedy="name the base that the model was trained from",
            )

    def _measure(self, name: str, executor: Executor) -> float:
        """‖Δ‖² of one tensor."""
        signs = [(checkpoint, sign) for checkpoint, sign in ((self.tuned, 1), (self.base, -1)) if name in checkpoint.entries]
        readers = [TensorReader(checkpoint, name, hashed=False) for checkpoint, _ in signs]
        squares = []
        for _, pieces in read_together(readers, executor):
            change = torch.zeros(max(map(len, pieces)), dtype=torch.float32)
            for piece, (_, sign) in zip(pieces, signs, strict=True):
                change[: len(piece)].add_(piece.float(), alpha=sign)
            squares.append(square_sum(change))
        return math.fsum(squares)

    def _is_linear(self, name: str, *, tied: bool) -> bool:
        old, new = self.base.entries.get(name), self.tuned.entries.get(name)
        if old is None or new is None or old.shape != new.shape or len(old.shape) != 2:
            return False
        if name == _HEAD:
            return not tied and not self.transposed
        return _IN_A_LAYER.fullmatch(name) is not None and not _EMBEDDINGS.fullmatch(name)


def square_sum(values: torch.Tensor) -> float:
    """‖values‖², summed in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _group(changes: dict[str, float]) -> list[Loss]:
    groups: dict[str, list[str]] = {}
    for name in changes:
        groups.setdefault(_kind(name), []).append(name)
    return [Loss(kind, names, math.fsum(changes[name] for name in names)) for kind, names in groups.items()]


def _kind(name: str) -> str:
    if _EMBEDDINGS.fullmatch(name):
        return "embeddings and head"
    if _NORMS.fullmatch(name):
        return "norms"
    return "biases" if name.endswith(".bias") else "other tensors"
