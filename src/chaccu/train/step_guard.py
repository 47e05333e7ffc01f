"""Which steps are taken: none whose loss or gradient is not finite; and the loss scale that float16 needs.

In float16 small gradients vanish and large ones overflow, so the loss is multiplied by a scale before the backward pass and the
gradients are divided by it after (Micikevicius et al. 2018, arXiv:1710.03740). The scale is found by trying, as
`torch.amp.GradScaler` finds it: halved when a gradient overflows, doubled after many that did not. GradScaler itself asks the
device and each process by itself; here the norm of the gradient decides, which the loop reads anyway and which is one for all.

Invariants: a skipped step changes no weight and no moment; so many in a row as the recipe allows end the run, and what they
were trained on lies beside the output for a look. A step that only the search for a scale has cost does not count among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from chaccu.artifact import atomic_file
from chaccu.errors import TrainError
from chaccu.train.pack import PackedRow
from chaccu.train.processes import ALONE, Processes
from chaccu.train.recipe import Recipe

_FIRST_SCALE, _GROW_AFTER = 2.0**16, 2000


class LossScale:
    """`value` multiplies the loss; a power of two, so that multiplying and dividing by it rounds nothing."""

    def __init__(self, value: float | None = None, *, grow_after: int = _GROW_AFTER) -> None:
        self.value = _FIRST_SCALE if value is None else value
        self._grow_after = grow_after
        self._good = 0

    def update(self, finite: bool) -> None:
        """Halve it after gradients that were not finite; double it after `grow_after` steps in a row that were."""
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value *= 0.5
        elif self._good == self._grow_after:
            self.value *= 2.0
            self._good = 0


class _Skipped(NamedTuple):
    number: int
    loss: float
    norm: float
    batch: Sequence[PackedRow]


class StepGuard:
    """Counts what is skipped. `dtype`: what the run computes in. `decode`: text of token ids, for the saved batch."""

    def __init__(
        self,
        recipe: Recipe,
        dtype: torch.dtype,
        decode: Callable[[Sequence[int]], str] | None = None,
        *,
        processes: Processes = ALONE,
    ) -> None:
        self._recipe = recipe
        self._processes = processes
        self._dtype = dtype
        self._decode = decode
        self._in_a_row: list[_Skipped] = []
        self.loss_scale = LossScale() if dtype == torch.float16 else None

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """What to run the backward pass from."""
        return loss if self.loss_scale is None else loss * self.loss_scale.value

    @torch.no_grad()
    def unscale(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Take the loss scale out of the gradients; call it before they are clipped."""
        if self.loss_scale is not None:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / self.loss_scale.value)

    def admits(self, number: int, loss: float, norm: float, batch: Sequence[PackedRow], rate: float) -> bool:
        """Whether step `number` may update weights.

        Raises `TrainError` when as many steps in a row may not as the recipe allows.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        searches = False
        if self.loss_scale is not None:
            searches = math.isfinite(loss) and self.loss_scale.value > 1.0
            self.loss_scale.update(finite)
        if finite:
            self._in_a_row.clear()
        elif not searches:
            self._in_a_row.append(_Skipped(number, loss, norm, batch))
            if len(self._in_a_row) >= self._recipe.max_skipped_steps:
                raise self._explain(rate)
        return finite

    def _explain(self, rate: float) -> TrainError:
        file = Path(f"{self._recipe.output}.failed-batch.jsonl")
        if self._processes.first:
            self._save(file)
        # The process that ends first takes the others with it.
        self._processes.wait()
        first, last = self._in_a_row[0], self._in_a_row[-1]
        precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(self._dtype, "fp32")
        steps = f"{len(self._in_a_row)} steps in a row" if len(self._in_a_row) > 1 else "1 step"
        others = {"fp16": "precision: bf16 or fp32, which reach further, ", "bf16": "precision: fp32, ", "fp32": ""}[precision]
        return TrainError(
            f"step {first.number}: loss {first.loss}, gradient norm {first.norm}, in {precision} at a rate of {rate:.2e}; "
            f"{steps} up to step {last.number} were not finite and changed nothing (max_skipped_steps: "
            f"{self._recipe.max_skipped_steps}). What they were trained on is in {file}.",
            remedy=f"look at that file; then a lower learning_rate or a longer warmup_ratio, {others}or other base weights",
        )

    def _save(self, file: Path) -> None:
        """One line a conversation of the skipped steps."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as stream:
            for step in self._in_a_row:
                for number, row in enumerate(step.batch):
                    for line in self._describe(step.number, number, row):
                        stream.write(msgspec.json.encode(line) + b"\n")

    def _describe(self, step: int, number: int, row: PackedRow) -> list[dict[str, object]]:
        lines: list[dict[str, object]] = []
        for begin, length in zip(accumulate([0, *row.lengths[:-1]]), row.lengths, strict=True):
            ids = [int(token) for token in row.ids_T[begin : begin + length]]
            mask = [int(bit) for bit in row.mask_T[begin : begin + length]]
            text = None if self._decode is None else self._decode(ids)
            lines.append({"step": step, "row": number, "length": length, "text": text, "ids": ids, "mask": mask})
        return lines
