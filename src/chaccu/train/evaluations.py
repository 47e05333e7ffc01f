"""Evaluations of a model in training: its loss on the validation rows and its sample answers, and which loss was the best.

Invariant: the model is not evaluated twice after one step. Where a model is spread over processes, all of them evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence

from chaccu.train.loop import evaluate
from chaccu.train.model import TrainableModel
from chaccu.train.pack import PackedRow
from chaccu.train.report import EvalReport
from chaccu.train.samples import Sampler


class Evaluations:
    """Evaluates one model on the same rows and questions; `last` is what came of it the last time, `first` the first."""

    def __init__(self, model: TrainableModel, rows: Sequence[PackedRow], sampler: Sampler) -> None:
        self._model = model
        self._rows = rows
        self._sampler = sampler
        self.first: EvalReport | None = None
        self.last: EvalReport | None = None

    def run(self, step: int) -> EvalReport:
        """The model as it is after `step` steps. Raises `ValueError` when there are no rows."""
        if self.last is not None and self.last.step == step:
            return self.last
        loss = evaluate(self._model, self._rows)
        if loss is None:
            raise ValueError("there are no rows to evaluate on")
        best_loss, best_step = loss, step
        if self.last is not None and self.last.best_loss <= loss:
            best_loss, best_step = self.last.best_loss, self.last.best_step
        samples = self._sampler.answer()
        self.last = EvalReport(step=step, loss=loss, best_loss=best_loss, best_step=best_step, samples=samples)
        self.first = self.first or self.last
        return self.last

    def loss_at(self, step: int) -> float | None:
        """The held-out loss after `step` steps, when it is known."""
        return self.last.loss if self.last is not None and self.last.step == step else None
