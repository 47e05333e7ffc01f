"""The schedule's shape, and which weights decay."""

from __future__ import annotations

import msgspec
import pytest

from chaccu.train.recipe import DataSource, Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.optim import build_optimizer, learning_rate_at  # noqa: E402 (torch may be absent)

RECIPE = Recipe(model="m", output="o", data=[DataSource(path="p")], learning_rate=0.8, warmup_ratio=0.2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("scheduler", "at_start", "halfway_down", "at_end"),
    [("cosine", 0.8, 0.4, 0.0), ("linear", 0.8, 0.4, 0.0), ("constant", 0.8, 0.8, 0.8)],
)
def test_warm_up_then_decay(scheduler: str, at_start: float, halfway_down: float, at_end: float) -> None:
    recipe = msgspec.convert({**msgspec.to_builtins(RECIPE), "lr_scheduler": scheduler}, Recipe)
    rates = [learning_rate_at(recipe, progress) for progress in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.0, 0.4, at_start, halfway_down, at_end])


def test_without_warm_up_the_first_rate_is_whole() -> None:
    assert learning_rate_at(msgspec.structs.replace(RECIPE, warmup_ratio=0.0), 0.0) == 0.8


def test_matrices_decay_and_vectors_do_not() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = build_optimizer([matrix, vector], RECIPE).param_groups
    assert [(group["params"][0].ndim, group["weight_decay"]) for group in groups] == [(2, 0.1), (1, 0.0)]
    assert len(build_optimizer([matrix], RECIPE).param_groups) == 1
