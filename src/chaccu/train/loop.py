"""The training loop: packed rows to optimizer steps, and what each step was.

Invariants: the loss of a step is normalised by the trained tokens of the whole step, so neither accumulation nor the number of
processes changes it; every process takes the same steps; a step whose loss or gradient is not finite changes nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence

import torch

from chaccu.train.batch import plan_steps
from chaccu.train.meter import StepMeter
from chaccu.train.model import RowTensors, TrainableModel
from chaccu.train.optim import StepOptimizer, build_optimizer, learning_rate_at
from chaccu.train.pack import PackedRow
from chaccu.train.recipe import Recipe
from chaccu.train.report import StepReport
from chaccu.train.step_guard import StepGuard


def run_steps(
    model: TrainableModel,
    rows: Sequence[PackedRow],
    recipe: Recipe,
    report: Callable[[StepReport], None] | None = None,
    *,
    decode: Callable[[Sequence[int]], str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[StepReport]:
    """Train on `rows` for the recipe's epochs, `max_steps` or `max_minutes` of `clock`, whichever ends first.

    `decode`: text of token ids, for what is saved when the run fails. Raises `TrainError` when the loss or the gradient is not
    finite `max_skipped_steps` times in a row.
    """
    model.fit_memory(recipe)
    processes = model.processes
    guard = StepGuard(recipe, model.dtype, decode, processes=processes)
    optimizer = build_optimizer(model.parameters, recipe)
    schedule = plan_steps(rows, recipe, processes.count)
    meter = StepMeter(model)
    log: list[StepReport] = []
    if recipe.max_minutes:
        clock = processes.shared(clock)
    begun = clock()
    ready = [model.prepare_row(row) for row in processes.share(schedule[0])] if schedule else []
    with contextlib.closing(optimizer):
        for number, batch in enumerate(schedule, 1):
            step_begun = clock()
            progress = max((number - 1) / len(schedule), _time_spent(recipe, step_begun - begun))
            if progress >= 1:
                break
            # The first step would otherwise be taken at a rate of 0.
            rate = learning_rate_at(recipe, max(progress, min(1 / len(schedule), recipe.warmup_ratio)))
            optimizer.set_rate(rate)
            meter.begin()
            losses = _run_backward(model, ready, batch, recipe, optimizer, guard)
            ready = [model.prepare_row(row) for row in processes.share(schedule[number])] if number < len(schedule) else []
            guard.unscale(model.parameters)
            # What is read here waits for the device: once a step.
            loss, norm = torch.stack([processes.sum(torch.stack(losses).sum()), optimizer.clip()]).tolist()
            taken = guard.admits(number, loss, norm, batch, rate)
            if taken:
                optimizer.finish_step()
            else:
                optimizer.skip_step()
            now = clock()
            done = max(number / len(schedule), _time_spent(recipe, now - begun))
            log.append(
                StepReport(
                    step=number,
                    steps=len(schedule),
                    loss=_finite(loss),
                    grad_norm=_finite(norm),
                    learning_rate=rate,
                    left_s=(now - begun) * (1 / done - 1),
                    skipped=not taken,
                    **meter.finish(batch, now - step_begun)._asdict(),
                )
            )
            if report:
                report(log[-1])
    return log


def _run_backward(
    model: TrainableModel,
    ready: Sequence[RowTensors],
    batch: Sequence[PackedRow],
    recipe: Recipe,
    optimizer: StepOptimizer,
    guard: StepGuard,
) -> list[torch.Tensor]:
    """The backward pass of each row in `ready`, this process's share of `batch`; their parts of the step's loss."""
    trained = sum(row.trained_tokens for row in batch)
    losses = []
    for place, row in enumerate(ready, 1):
        optimizer.begin_backward(last=place == len(ready))
        row_loss = model.row_loss(row) / trained
        losses.append(row_loss.detach())
        # What is updated before the step's loss is known, all processes update or none does.
        optimizer.watch(model.processes.sum(losses[-1]) if recipe.optimizer_in_backward else losses[-1])
        guard.scale_loss(row_loss).backward()  # type: ignore[no-untyped-call]
    return losses


def _time_spent(recipe: Recipe, seconds: float) -> float:
    """The share of `max_minutes` that is over; 0 without that limit."""
    return seconds / (60 * recipe.max_minutes) if recipe.max_minutes else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.no_grad()
def evaluate(model: TrainableModel, rows: Sequence[PackedRow]) -> float | None:
    """Mean cross-entropy a trained token over `rows`, in nats; None when there are none."""
    if not rows:
        return None
    model.full.eval()
    total = sum(model.row_loss(row).item() for row in model.processes.share(rows))
    model.full.train()
    return model.processes.sum(torch.tensor(total, dtype=torch.float64)).item() / sum(row.trained_tokens for row in rows)
