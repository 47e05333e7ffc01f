"""How a step is cut into rows does not change training, whatever the optimizer, and neither does updating in the backward pass.

`adamw` on float32 weights: equal but for the order of sums. The others round stochastically, so that two runs of one
configuration whose seeds differ come out apart: each step a weight by a coin between two bfloat16 numbers, a moment by one
between two codes. Configurations are equivalent when they lie no farther apart than two such runs. Distances are over 100,000
weights, each with a coin of its own, so that those of one law agree to some percent. The bound is the largest between three
seeds, and a fifth more for what sums in 8 bits add: 3 % to a gradient for each pass, which moves a weight by less than half of
what its own rounding does, and √(1 + ½²) is 1.12. A step of only some of the rows is many times farther away, as the test
shows.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.conversation import Encoded
from chaccu.testing.tiny import build_llama
from chaccu.train.pack import PackedRow, pack_rows
from chaccu.train.recipe import DataSource, Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train.loop import run_steps  # noqa: E402 (torch may be absent)
from chaccu.train.model import TrainableModel  # noqa: E402

LEAN = ("adamw_8bit", "adamw_bf16_sr", "adafactor")
CONVERSATIONS = [
    Encoded([(7 * index + 3 * step) % 200 for step in range(length)], [0] * (length // 2) + [1] * (length - length // 2), ())
    for index, length in enumerate((40, 12, 25, 9, 33, 18, 21, 14, 30, 11, 17, 28))
]
STEPS = [CONVERSATIONS[start : start + 4] for start in range(0, 12, 4)]
JOINED = [row for group in STEPS for row in pack_rows(group, 256, seed=0)]
SPLIT = [row for group in STEPS for one in group for row in pack_rows([one], len(one.ids), seed=0)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("base") / "tiny-llama")


def train(llama: Path, rows: list[PackedRow], **fields: Any) -> torch.Tensor:
    """All weights after nine steps, in one vector. The seed decides how is rounded, and nothing else."""
    recipe = Recipe(
        model=str(llama),
        output="-",
        data=[DataSource(path="-")],
        method="full",
        sequence_len=256,
        learning_rate=1e-3,
        max_grad_norm=1e9,
        precision="bf16",
    )
    recipe = msgspec.structs.replace(recipe, **fields)
    model = TrainableModel(recipe, torch.device("cpu"))
    log = run_steps(model, rows * 3, recipe)
    assert len(log) == 9
    return torch.cat([parameter.detach().float().reshape(-1) for parameter in model.parameters])


def test_one_row_or_four_are_the_same_step_with_adamw(llama: Path) -> None:
    joined = train(llama, JOINED, optimizer="adamw", precision="fp32")
    split = train(llama, SPLIT, optimizer="adamw", precision="fp32", gradient_accumulation_steps=4)
    torch.testing.assert_close(split, joined, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LEAN)
def test_one_row_or_four_in_the_backward_pass_or_after_it_are_as_close_as_two_seeds(llama: Path, name: str) -> None:
    joined = train(llama, JOINED, optimizer=name)
    seeds = [joined, *(train(llama, JOINED, optimizer=name, seed=seed) for seed in (1, 2))]
    limit = 1.2 * max(float((one - other).norm()) for one, other in itertools.combinations(seeds, 2))
    after = train(llama, SPLIT, optimizer=name, gradient_accumulation_steps=4)
    within = train(llama, SPLIT, optimizer=name, gradient_accumulation_steps=4, optimizer_in_backward=True)
    for one, other in ((after, joined), (within, joined), (within, after)):
        assert (one - other).norm() < limit
    quarter = train(llama, SPLIT[::4], optimizer=name)
    assert (quarter - joined).norm() > 3 * limit
