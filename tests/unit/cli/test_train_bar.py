"""What the bar of a training run says."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from chaccu.cli.train_bar import describe_eval, describe_step, format_seconds, train_with_bar
from chaccu.train.recipe import DataSource, Recipe
from chaccu.train.report import EvalReport, SampleAnswer, StepReport

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


def test_an_evaluation_shows_its_loss_the_best_one_and_what_the_model_says() -> None:
    samples = (SampleAnswer("What\n is it?", "A llama.\n\nIt walks.", True), SampleAnswer("And?", "so \x1b[2Jon", False))
    report = EvalReport(step=20, loss=1.5, best_loss=1.25, best_step=10, samples=samples)
    assert describe_eval(report) == [
        "step 20: held-out loss 1.5000, best 1.2500 at 10",
        "  > What is it?",
        "    A llama. It walks.",
        "  > And?",
        "    so \ufffd[2Jon …",
    ]
    best = EvalReport(step=10, loss=1.25, best_loss=1.25, best_step=10)
    assert describe_eval(best) == ["step 10: held-out loss 1.2500, the best so far"]


@pytest.mark.parametrize(
    ("done", "shown"), [(1500, ["encoding 17,344 conversations", "1500/17344"]), (17344, ["loading the model"])]
)
def test_the_bar_counts_the_conversations_that_are_encoded(
    done: int, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pytest.importorskip("chaccu.train.run", reason="torch is not installed")

    def train(recipe: Recipe, *, report_encoding: Callable[[int, int], None], **_: object) -> None:
        report_encoding(0, 17344)
        report_encoding(done, 17344)

    monkeypatch.setattr(run, "train", train)
    train_with_bar(Recipe(model="m", data=[DataSource(path="d")], output="o"), fresh=False, replace=False)
    said = capsys.readouterr().err
    assert all(text in said for text in shown), said
    assert ("encoding" in said) == (done < 17344)
