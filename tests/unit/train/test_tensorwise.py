"""Updates tensor by tensor: what is kept between backward passes, what is clipped, and what a step leaves behind."""

from __future__ import annotations

import math

import msgspec
import pytest

from chaccu.train.recipe import DataSource, Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.optim import build_optimizer, optimizer_bytes  # noqa: E402 (torch may be absent)
from chaccu.train.quantised_moments import decode_mean  # noqa: E402

RECIPE = Recipe(
    model="m",
    output="o",
    data=[DataSource(path="p")],
    method="full",
    optimizer="adamw_8bit",
    optimizer_in_backward=True,
    gradient_accumulation_steps=2,
)
LEAN = ("adamw_8bit", "adamw_bf16_sr", "adafactor")


def change(**fields: object) -> Recipe:
    return msgspec.convert({**msgspec.to_builtins(RECIPE), **fields}, Recipe)


def run_passes(optimizer: object, *losses: torch.Tensor) -> float:
    """The backward passes of one step; the norm that is reported."""
    for number, loss in enumerate(losses, 1):
        optimizer.begin_backward(last=number == len(losses))  # type: ignore[attr-defined]
        optimizer.watch(loss.detach())  # type: ignore[attr-defined]
        loss.backward()  # type: ignore[no-untyped-call]
    return float(optimizer.clip())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", LEAN)
def test_the_last_pass_updates_by_the_sum_and_no_gradient_is_kept(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(20, 30))
    optimizer = build_optimizer([weight], change(optimizer=name, learning_rate=0.01))
    optimizer.begin_backward(last=False)
    (3.0 * weight).sum().backward()
    assert weight.grad is None
    assert torch.equal(weight, torch.ones(20, 30))
    # The first pass alone would make the weight smaller.
    norm = run_passes(optimizer, (-5.0 * weight).sum())
    assert weight.grad is None
    assert weight.detach().mean().item() == pytest.approx(1.01, abs=1e-3)
    assert norm == pytest.approx(2.0 * 600**0.5, rel=0.01)
    optimizer.finish_step()
    assert weight.detach().mean().item() == pytest.approx(1.01, abs=1e-3)


def test_clipped_is_the_whole_steps_gradient_of_each_tensor() -> None:
    """Of passes that cancel each other out, the sum is small and left alone; clipped by themselves, both would count alike."""
    big, small = torch.nn.Parameter(torch.zeros(300)), torch.nn.Parameter(torch.zeros(300))
    optimizer = build_optimizer([big, small], change(max_grad_norm=1.0))
    norm = run_passes(optimizer, (3.0 * big + 9.0 * small).sum(), (1.0 * big - 8.99 * small).sum())
    sums = torch.tensor([4.0 * 300**0.5, 0.01 * 300**0.5])
    assert norm == pytest.approx(sums.norm().item(), rel=0.01)
    state = {id(weight.parameter): weight.state for weight in optimizer._weights}  # type: ignore[attr-defined]
    # m after one step is a tenth of the gradient.
    assert decode_mean(state[id(big)]).norm().item() == pytest.approx(0.1, rel=0.01)
    assert decode_mean(state[id(small)]).norm().item() == pytest.approx(0.1 * sums[1].item(), rel=0.02)


def test_each_tensor_is_scaled_by_the_norm_over_all_as_far_as_it_is_known() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(256)) for _ in range(2))
    optimizer = build_optimizer([first, second], change(max_grad_norm=1.0, gradient_accumulation_steps=1))
    states = [one.state for one in optimizer._weights]  # type: ignore[attr-defined]

    def step(*norms: float) -> list[float]:
        """What was left of the norms, by what they add to a tenth of m; `second` gets its gradient first."""
        before = [0.9 * decode_mean(state).norm().item() for state in states]
        loss = sum((weight * norm / 16).sum() for weight, norm in zip((first, second), norms, strict=True))
        order: list[int] = []
        for number, weight in enumerate((first, second)):
            weight.register_hook(lambda _, number=number: order.append(number))
        run_passes(optimizer, loss)  # type: ignore[arg-type]
        assert order[:2] == [1, 0]
        left = [decode_mean(state).norm().item() for state in states]
        optimizer.finish_step() if math.isfinite(sum(norms)) else optimizer.skip_step()
        return [10 * (now - was) for now, was in zip(left, before, strict=True)]

    # Nothing is known but what has come: 4 alone, then 5 in all.
    assert step(3.0, 4.0) == pytest.approx([3 / 5, 4 / 4], abs=0.02)
    # As in the step before: both by the norm over all.
    assert step(3.0, 4.0) == pytest.approx([3 / 5, 4 / 5], abs=0.02)
    # All grew: the first to come is held to little more than 1, the last by what is true.
    assert step(30.0, 40.0) == pytest.approx([30 / 50, 40 / (40**2 + 3**2) ** 0.5], abs=0.02)
    # All shrank: the first is still scaled by what was.
    assert step(0.3, 0.4) == pytest.approx([0.3, 0.4 / (30**2 + 0.4**2) ** 0.5], abs=0.02)
    # A step that is not finite is forgotten.
    step(float("nan"), 1.0)
    assert step(0.3, 4.0) == pytest.approx([0.3 / 16.09**0.5, 4 / 16.09**0.5], abs=0.03)


def test_a_weight_that_the_last_pass_does_not_reach_is_updated_by_what_is_held() -> None:
    reached, missed = torch.nn.Parameter(torch.ones(300)), torch.nn.Parameter(torch.ones(300))
    optimizer = build_optimizer([reached, missed], change(learning_rate=0.01))
    norm = run_passes(optimizer, (reached + 2.0 * missed).sum(), reached.sum())
    optimizer.finish_step()
    assert norm == pytest.approx(2.0 * 600**0.5, rel=0.01)
    for weight in (reached, missed):
        assert weight.detach().mean().item() == pytest.approx(0.99, abs=1e-3)


def test_the_next_step_begins_with_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(300))
    optimizer = build_optimizer([weight], RECIPE)
    norms = []
    for end in (optimizer.finish_step, optimizer.skip_step, optimizer.finish_step):
        norms.append(run_passes(optimizer, weight.sum(), weight.sum()))
        end()
    optimizer.begin_backward(last=False)
    weight.sum().backward()
    optimizer.skip_step()
    norms.append(run_passes(optimizer, weight.sum(), weight.sum()))
    assert norms == pytest.approx([2.0 * 300**0.5] * 4, rel=0.01)


@pytest.mark.parametrize("name", LEAN)
def test_a_gradient_that_is_not_finite_in_any_pass_updates_nothing(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(20, 30))
    optimizer = build_optimizer([weight], change(optimizer=name, learning_rate=0.01))
    # A root's gradient at 0, while the loss itself is finite.
    assert not math.isfinite(run_passes(optimizer, (weight - 1.0).abs().sqrt().sum(), weight.sum()))
    optimizer.skip_step()
    assert torch.equal(weight, torch.ones(20, 30))
    assert run_passes(optimizer, weight.sum(), weight.sum()) == pytest.approx(2.0 * 600**0.5, rel=0.01)
    optimizer.finish_step()
    # A step that is skipped in the backward pass counts for the moments' bias: the next is smaller.
    assert 0.989 < weight.detach().mean().item() < 0.995


@pytest.mark.parametrize(
    ("fields", "bytes_a_weight"),
    [
        ({"optimizer": "adamw", "optimizer_in_backward": False}, 8),
        ({"optimizer": "adamw_8bit", "optimizer_in_backward": False}, 2.03125),
        ({"gradient_accumulation_steps": 1}, 2.03125),
        ({}, 3.046875),
        ({"optimizer": "adamw_bf16_sr"}, 5.015625),
    ],
)
def test_memory_is_what_is_allocated(fields: dict[str, object], bytes_a_weight: float) -> None:
    recipe = change(**fields)
    weight = torch.nn.Parameter(torch.ones(512, 256, dtype=torch.float32 if recipe.optimizer == "adamw" else torch.bfloat16))
    assert optimizer_bytes(recipe, [weight]) == bytes_a_weight * weight.numel()
    optimizer = build_optimizer([weight], recipe)
    run_passes(optimizer, *[weight.sum() for _ in range(recipe.gradient_accumulation_steps)])
    optimizer.finish_step()
    if recipe.optimizer == "adamw":
        kept = [one for one in optimizer.inner.state[weight].values() if one.numel() > 1]  # type: ignore[attr-defined]
    else:
        (held,) = optimizer._weights  # type: ignore[attr-defined]
        kept = [*held.state, *(held.held or ())]
    assert sum(one.numel() * one.element_size() for one in kept) == optimizer_bytes(recipe, [weight])
