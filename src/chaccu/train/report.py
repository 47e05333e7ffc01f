"""What a run reports while it goes: one record of how it begins, one an optimizer step and one an evaluation, as the bar, the
log and the trackers show them; and what it comes to.

Invariant: free of torch, so that what reads a log needs none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import storage_errors

LOG_NAME = "train_log.jsonl"


class StartReport(msgspec.Struct, frozen=True, kw_only=True, tag="start", tag_field="kind"):
    """What a run is about to do, where the recipe leaves it to the machine and the data.

    `device` of the first of the `processes`; `precision` of the computation and `weights_precision` of the weights that are
    trained; `float8_products`: linear modules that multiply in float8; `attention`: its kernels. `conversations` of one epoch
    are `tokens` in so many `rows`; `left_out` are those that were read and have more than their source's `max_tokens`, by path.
    """

    device: str
    processes: int
    precision: str
    weights_precision: str
    float8_products: int
    attention: str
    trained_parameters: int
    conversations: int
    left_out: dict[str, int]
    rows: int
    tokens: int


class StepReport(msgspec.Struct, frozen=True, kw_only=True, tag="step", tag_field="kind"):
    """One optimizer step, numbered from 1.

    `loss`: nats a trained token. A skipped step changed nothing, since loss or gradient was not finite: what was not is None.
    `tokens_per_s`: tokens of conversations, padding left out. `mfu`: share of the chip's dense
    16-bit peak that the model's own work takes (None where no peak is known). `memory_bytes`: on a GPU the most that was
    allocated in the step, elsewhere the process's resident set. `left_s`: expected time to the end.
    """

    step: int
    steps: int
    loss: float | None
    grad_norm: float | None
    learning_rate: float
    tokens_per_s: float
    mfu: float | None
    memory_bytes: int
    left_s: float
    skipped: bool = False


class SampleAnswer(msgspec.Struct, frozen=True):
    """What the model in training answers to a held-out question. `ended`: by its end of turn, rather than by the limit of
    tokens."""

    question: str
    answer: str
    ended: bool


class EvalReport(msgspec.Struct, frozen=True, kw_only=True, tag="eval", tag_field="kind"):
    """The model after `step` steps: `loss` in nats a trained token of the validation rows, the best one so far
    with its step, and sample answers."""

    step: int
    loss: float
    best_loss: float
    best_step: int
    samples: tuple[SampleAnswer, ...] = ()


class TrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run. Losses are nats a trained token on the validation rows (None without validation data); `tokens` and
    `trained_tokens` are those of the steps that were taken, every epoch counted; `fill` of the rows; `token_rows`:
    tokens whose rows were trained beside LoRA; `packing`: how the base lay in 4 bits meanwhile; `skipped_steps`: steps that
    changed nothing, since they were not finite; `best_loss`: the least held-out loss that was met, after `best_step` steps;
    `samples`: what the trained model answers to held-out questions; `config_changes`: values of the base's config that merging
    has to change too."""

    output: str
    steps: int
    loss_before: float | None
    loss_after: float | None
    tokens: int
    trained_tokens: int
    seconds: float
    fill: float
    token_rows: list[str]
    skipped_steps: int = 0
    packing: str | None = None
    log: list[StepReport]
    best_loss: float | None = None
    best_step: int | None = None
    samples: tuple[SampleAnswer, ...] = ()
    config_changes: dict[str, Any] = {}
    left_out: dict[str, int] = {}
    reused: bool = False


Record = StartReport | StepReport | EvalReport


def read_log(path: Path) -> list[Record]:
    """The records of a run's `train_log.jsonl`, in order. Raises `StorageError`."""
    with storage_errors(path):
        lines = path.read_bytes().splitlines()
    return [msgspec.json.decode(line, type=Record) for line in lines]
