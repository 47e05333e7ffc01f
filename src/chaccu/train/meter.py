"""`StepMeter`: speed, share of the peak and memory of a step.

Invariant: nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from chaccu.train.flops import count_model_flops, find_device_peak
from chaccu.train.model import TrainableModel
from chaccu.train.pack import PackedRow


class StepCost(NamedTuple):
    """See `StepReport`."""

    tokens_per_s: float
    mfu: float | None
    memory_bytes: int


class StepMeter:
    """Measures the steps of one model, one after another."""

    def __init__(self, model: TrainableModel) -> None:
        self._device = model.device
        self._flops = count_model_flops(model.causal)
        self._peak = find_device_peak(model.device)
        self._chips = model.processes.count
        self._process = psutil.Process()

    def begin(self) -> None:
        """A step begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def finish(self, batch: Sequence[PackedRow], seconds: float) -> StepCost:
        """The step that began last has taken these rows, over all processes, and so many seconds."""
        lengths = [length for row in batch for length in row.lengths]
        mfu = None if self._peak is None else self._flops.count(lengths) / (seconds * self._peak * self._chips)
        return StepCost(sum(lengths) / seconds, mfu, self._memory_bytes())

    def _memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return int(self._process.memory_info().rss)
