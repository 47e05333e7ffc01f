"""8-bit moments: close to AdamW's own, right in expectation, and the kernel the same as the plain version."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.adam import Rates  # noqa: E402 (torch may be absent)
from chaccu.train.quantised_moments import (  # noqa: E402
    decode_mean,
    decode_root,
    new_moments,
    step_parameter,
)
from chaccu.train.rounding import BLOCK  # noqa: E402

ONE = torch.ones(())


def rates(step: int, rate: float = 1e-2) -> Rates:
    return Rates(rate, 0.9, 0.999, 1e-8, 0.1, step)


def gradients(count: int, steps: int, device: str = "cpu") -> list[torch.Tensor]:
    """Of one sign more often than not, and of sizes that span five orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-4, 1, count)
    return [((torch.randn(count, generator=generator) + 0.3) * size).to(device) for _ in range(steps)]


@pytest.mark.parametrize("count", [3 * BLOCK, 3 * BLOCK + 17])
def test_it_goes_where_adamw_goes(count: int) -> None:
    begin = torch.randn(count, generator=torch.Generator().manual_seed(1))
    ours, theirs = begin.clone(), torch.nn.Parameter(begin.clone())
    moments, adamw = new_moments(ours), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for step, gradient in enumerate(gradients(count, 50), 1):
        step_parameter(ours, gradient, moments, rates(step), step, ONE)
        theirs.grad = gradient
        adamw.step()
    state = adamw.state[theirs]
    assert (ours - theirs).norm() < 0.05 * (theirs - begin).norm()
    assert (decode_mean(moments) - state["exp_avg"]).norm() < 0.05 * state["exp_avg"].norm()
    assert (decode_root(moments) - state["exp_avg_sq"].sqrt()).norm() < 0.03 * state["exp_avg_sq"].sqrt().norm()


def test_no_update_is_out_of_proportion() -> None:
    """Gradients of one block that differ a millionfold: what is too small for the block's codes must not be divided by
    nothing."""
    weight = torch.zeros(BLOCK)
    moments = new_moments(weight)
    sizes = torch.logspace(-6, 0, BLOCK)
    for step in range(1, 101):
        before = weight.clone()
        step_parameter(weight, sizes * (1 if step % 3 else -1), moments, Rates(1e-3, 0.9, 0.999, 1e-8, 0.0, step), step, ONE)
        assert (weight - before).abs().max() < 1.5e-3
    assert (decode_root(moments) > 0).all()


def test_what_is_stored_is_right_in_expectation() -> None:
    """Rates so small that rounding to the nearest would lose each single update of a bfloat16 weight."""
    count = 4096
    weight = torch.full((count,), 1.0, dtype=torch.bfloat16)
    moments = new_moments(weight)
    for step in range(1, 101):
        gradient = torch.ones(count)
        step_parameter(weight, gradient, moments, Rates(1e-4, 0.9, 0.999, 1e-8, 0.0, step), step, ONE)
    assert weight.float().mean().item() == pytest.approx(1.0 - 100 * 1e-4, abs=3e-4)
    assert decode_mean(moments).mean().item() == pytest.approx(1.0 - 0.9**100, rel=5e-3)
    assert decode_root(moments).square().mean().item() == pytest.approx(1.0 - 0.999**100, rel=2e-2)


def test_equal_seeds_give_equal_bits() -> None:
    weights = [torch.ones(700, dtype=torch.bfloat16) for _ in range(3)]
    for weight, seed in zip(weights, (7, 7, 8), strict=True):
        step_parameter(weight, torch.linspace(-1, 1, 700), new_moments(weight), rates(1, 1e-3), seed, ONE)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_scale_multiplies_the_gradient() -> None:
    gradient = torch.linspace(-3, 3, 600)
    scaled, plain = torch.ones(600), torch.ones(600)
    moments = [new_moments(scaled), new_moments(plain)]
    step_parameter(scaled, gradient, moments[0], rates(1), 3, torch.tensor(0.25))
    step_parameter(plain, gradient * 0.25, moments[1], rates(1), 3, ONE)
    assert torch.equal(scaled, plain)
    assert torch.equal(moments[0].mean_codes, moments[1].mean_codes)


def test_nothing_seen_and_no_rate_leaves_the_weight() -> None:
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = weight.clone()
    step_parameter(weight, torch.zeros(300), new_moments(weight), rates(1, 0.0), 1, ONE)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_scale_that_is_no_number_leaves_all_as_it_is(dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    weight = torch.randn(700, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    moments = new_moments(weight)
    step_parameter(weight, torch.ones_like(weight), moments, rates(1), 1, ONE.to(device))
    before = [one.clone() for one in (weight, *moments)]
    gradient = torch.full_like(weight, float("inf"))
    gradient[3] = float("nan")
    step_parameter(weight, gradient, moments, rates(2), 2, torch.tensor(float("nan"), device=device))
    assert all(torch.equal(one, was) for one, was in zip((weight, *moments), before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_plain_version(dtype: torch.dtype, kernel_device: str) -> None:
    from chaccu.train.adam_kernel import launch_step

    count = 10_003
    begin = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain, kernel = begin.clone(), begin.clone().to(kernel_device)
    moments = [new_moments(plain), new_moments(kernel)]
    for step, gradient in enumerate(gradients(count, 20), 1):
        step_parameter(plain, gradient.to(dtype), moments[0], rates(step), step, ONE)
        launch_step(kernel, gradient.to(dtype).to(kernel_device), moments[1], rates(step), step, ONE.to(kernel_device))
    noise = 0.05 if dtype == torch.float32 else 0.4
    moved = (plain.float() - begin.float()).norm()
    apart = plain.float() - kernel.cpu().float()
    assert apart.norm() < noise * moved
    # Rounding is noise: it has no direction.
    assert abs(apart.mean()) < 5 * apart.std() / count**0.5
    for decode in (decode_mean, decode_root):
        assert (decode(moments[0]) - decode(moments[1]).cpu()).norm() < 0.08 * decode(moments[0]).norm()
