"""bfloat16 weights and moments: close to AdamW in float32, nothing sticks, and the kernel is the plain version."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.adam import Rates  # noqa: E402
from chaccu.train.bfloat16_moments import new_moments, step_parameter  # noqa: E402 (torch may be absent)

ONE = torch.ones(())
NAN = torch.full((), float("nan"))


def rates(step: int, rate: float = 1e-2, decay: float = 0.1) -> Rates:
    return Rates(rate, 0.9, 0.999, 1e-8, decay, step)


def gradients(count: int, steps: int) -> list[torch.Tensor]:
    """Of one sign more often than not, and of sizes that span five orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-4, 1, count)
    return [(torch.randn(count, generator=generator) + 0.3) * size for _ in range(steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_where_adamw_goes(dtype: torch.dtype) -> None:
    steps, rate, count = 50, 1e-2, 3001
    begin = torch.randn(count, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    ours, theirs = begin.to(dtype, copy=True), torch.nn.Parameter(begin.clone())
    moments, adamw = new_moments(ours), torch.optim.AdamW([theirs], lr=rate, weight_decay=0.1)
    for step, gradient in enumerate(gradients(count, steps), 1):
        step_parameter(ours, gradient, moments, rates(step), step, ONE)
        theirs.grad = gradient
        adamw.step()
    # A bfloat16 is at most 2⁻⁷ of itself from the next: its rounding, a coin between the two, has half of that as its spread.
    rounding = 2.0**-8 * (begin.abs() + steps * rate) * steps**0.5 if dtype == torch.bfloat16 else torch.zeros(count)
    # m's and v's rounding: 2⁻⁸, added up over 10 steps, and over 50 (halved by the root), of a step of at most the rate each.
    rounding = rounding + steps * rate * 2.0**-8 * (10**0.5 + 50**0.5 / 2)
    assert (ours.float() - theirs).norm() < rounding.norm()
    assert (moments.mean.float() - adamw.state[theirs]["exp_avg"]).norm() < 0.02 * adamw.state[theirs]["exp_avg"].norm()
    assert (moments.variance.float() - adamw.state[theirs]["exp_avg_sq"]).norm() < 0.02 * adamw.state[theirs][
        "exp_avg_sq"
    ].norm()


def test_no_small_change_is_lost() -> None:
    """Weight and v move by less than half a bfloat16 step each time, so that rounding to the nearest would leave both."""
    count, steps = 4096, 200
    weight = torch.full((count,), 1.0, dtype=torch.bfloat16)
    moments = new_moments(weight)
    moments.variance.fill_(1.0)
    nearest = torch.tensor(1.0, dtype=torch.bfloat16)
    for step in range(1, steps + 1):
        step_parameter(weight, torch.zeros(count), moments, rates(step, 1e-3, 1.0), step, ONE)
        nearest = (nearest.float() * 0.999).bfloat16()
    assert nearest.item() == 1.0
    # Spread of one of 4,096 values below 0.03: of their mean, below 0.0005.
    assert weight.float().mean().item() == pytest.approx(0.999**steps, abs=0.0025)
    assert moments.variance.float().mean().item() == pytest.approx(0.999**steps, abs=0.0025)


def test_the_spread_of_v_is_below_that_of_its_gradients() -> None:
    """2,000 steps of random gradients of one size: what rounding adds to v is less than the spread v has in float32."""
    count, steps = 4096, 2000
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(count, dtype=torch.bfloat16)
    moments = new_moments(weight)
    exact = torch.zeros(count)
    for step in range(1, steps + 1):
        gradient = torch.randn(count, generator=generator)
        step_parameter(weight, gradient, moments, rates(step, 1e-3), step, ONE)
        exact += 0.001 * (gradient.square() - exact)
    added = moments.variance.float() - exact
    assert abs(added.mean().item()) < 5 * added.std().item() / count**0.5
    assert added.std() < 2 * exact.std()
    assert added.std() < 0.07 * exact.mean()


def test_what_is_not_a_number_in_the_scale_leaves_all_as_it_was() -> None:
    weight = torch.randn(300).bfloat16()
    moments = new_moments(weight)
    step_parameter(weight, torch.randn(300), moments, rates(1), 1, ONE)
    before = [one.clone() for one in (weight, *moments)]
    step_parameter(weight, torch.full((300,), float("inf")), moments, rates(2), 2, NAN)
    assert all(map(torch.equal, before, (weight, *moments)))


def test_equal_seeds_give_equal_bits() -> None:
    weights = [torch.ones(700, dtype=torch.bfloat16) for _ in range(3)]
    for weight, seed in zip(weights, (7, 7, 8), strict=True):
        step_parameter(weight, torch.linspace(-1, 1, 700), new_moments(weight), rates(1, 1e-3), seed, ONE)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_plain_version(dtype: torch.dtype, kernel_device: str) -> None:
    from chaccu.train.bfloat16_kernel import launch_step

    count, steps = 10_007, 20
    begin = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain, kernel = begin.clone(), begin.clone().to(kernel_device)
    moments = [new_moments(plain), new_moments(kernel)]
    for step, gradient in enumerate(gradients(count, steps), 1):
        step_parameter(plain, gradient.to(dtype), moments[0], rates(step), step, ONE)
        launch_step(kernel, gradient.to(dtype).to(kernel_device), moments[1], rates(step), step, ONE.to(kernel_device))
    apart = plain.float() - kernel.cpu().float()
    # As in test_it_goes_where_adamw_goes, of two that are rounded.
    rounding = 2.0**-8 * (begin.float().abs() + steps * 1e-2) * steps**0.5 if dtype == torch.bfloat16 else torch.zeros(count)
    rounding = rounding + steps * 1e-2 * 2.0**-8 * (10**0.5 + 20**0.5 / 2)
    assert apart.norm() < 2**0.5 * rounding.norm()
    # Rounding is noise: it has no direction.
    assert abs(apart.mean()) < 5 * apart.std() / count**0.5
    for ours, theirs in zip(*moments, strict=True):
        assert (ours.float() - theirs.cpu().float()).norm() < 0.03 * ours.float().norm()
    before = [one.clone() for one in (kernel, *moments[1])]
    launch_step(kernel, torch.full_like(kernel, float("nan")), moments[1], rates(21), 21, NAN.to(kernel_device))
    assert all(map(torch.equal, before, (kernel, *moments[1])))
