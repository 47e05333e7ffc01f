"""What the bar of a training run says."""

from __future__ import annotations

import msgspec

from chaccu.cli.train_bar import describe_step, format_seconds
from chaccu.train.report import StepReport

STEP = StepReport(
    step=3, steps=9, loss=1.2345, grad_norm=0.678, learning_rate=2e-4, tokens_per_s=13352.4, mfu=0.5549,
    memory_bytes=80_900_000_000, left_s=3723.0,
)  # fmt: skip


def test_the_bar_shows_loss_norm_rate_speed_share_of_the_peak_and_memory() -> None:
    assert describe_step(STEP) == "loss 1.234  norm 0.68  lr 2.0e-04  13,352 tok/s  MFU 55.5%  80.9 GB"


def test_without_a_known_peak_no_share_is_shown() -> None:
    assert "MFU" not in describe_step(msgspec.structs.replace(STEP, mfu=None))


def test_seconds_read_as_a_clock_does() -> None:
    assert [format_seconds(seconds) for seconds in (0, 59.6, 754, 3723)] == ["0:00", "1:00", "12:34", "1:02:03"]
