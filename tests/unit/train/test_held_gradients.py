"""Sums of gradients in 8 bits: right in expectation, within a bound for each value, and never silently finite."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.held_gradients import (  # noqa: E402 (torch may be absent)
    HeldGradient,
    hold_gradient,
    new_held_gradient,
    release_gradient,
)
from chaccu.train.rounding import BLOCK  # noqa: E402

COUNT = 3 * BLOCK + 17


def parts(passes: int) -> list[torch.Tensor]:
    """Gradients of several passes, in bfloat16's numbers, with sizes that span three orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-3, 0, COUNT)
    return [(torch.randn(COUNT, generator=generator) * size).bfloat16().float() for _ in range(passes)]


def sum_of(gradients: list[torch.Tensor], seed: int) -> torch.Tensor:
    held = new_held_gradient(gradients[0])
    for number, gradient in enumerate(gradients[:-1]):
        hold_gradient(gradient, held, seed * 100 + number, first=number == 0)
    return release_gradient(gradients[-1].clone(), held)


def spread_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of each value of the sum, at most: half the gap between two codes around each partial sum (a coin between both ends), the
    squares of all added up. The gap at a code c of 127 is at most 4·((c + 1) / 127)³ / 127 of the block's largest."""
    variance, partial = torch.zeros(COUNT), torch.zeros(COUNT)
    for gradient in gradients[:-1]:
        partial = partial + gradient
        padded = torch.nn.functional.pad(partial, (0, -COUNT % BLOCK)).view(-1, BLOCK)
        # What was rounded before may have moved the partial sum itself: by a twentieth, generously.
        largest = 1.05 * padded.abs().amax(dim=1).repeat_interleave(BLOCK)[:COUNT]
        code = 127 * (1.05 * partial.abs() / largest).clamp_max(1) ** 0.25
        variance += (largest * 4 * ((code + 1) / 127) ** 3 / 127 / 2) ** 2
    return variance.sqrt()


@pytest.mark.parametrize("passes", [2, 4, 16])
def test_the_sum_is_right_in_expectation_and_as_close_as_its_codes(passes: int) -> None:
    gradients = parts(passes)
    exact = torch.stack(gradients).sum(dim=0)
    errors = torch.stack([sum_of(gradients, seed) for seed in range(100)]) - exact
    spread = spread_of(gradients)
    assert (errors.square().mean(dim=0).sqrt() <= 1.3 * spread).all()
    # The mean of 100 has a tenth of the spread.
    assert (errors.mean(dim=0).abs() <= 5 * spread / 10).all()
    assert errors[0].norm() < 0.03 * passes**0.5 * exact.norm()


def test_the_first_takes_the_place_of_what_stood_there() -> None:
    gradient = parts(1)[0]
    fresh, used = new_held_gradient(gradient), new_held_gradient(gradient)
    used.codes.fill_(99)
    used.scales.fill_(float("nan"))
    for held in (fresh, used):
        hold_gradient(gradient, held, 3, first=True)
    assert torch.equal(fresh.codes, used.codes)
    assert torch.equal(fresh.scales, used.scales)


def test_a_gradient_that_does_not_lie_in_one_piece_is_summed_too() -> None:
    gradient = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    held = new_held_gradient(gradient)
    hold_gradient(gradient.t(), held, 1, first=True)
    total = release_gradient(gradient.t(), held)
    assert (total - 2 * gradient.t()).norm() < 0.03 * total.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen_in_the_sum(bad: float) -> None:
    broken, fine = torch.ones(600), torch.ones(600)
    broken[300] = bad
    assert not release_gradient(torch.ones(600), hold(broken, fine)).norm().isfinite()
    assert not release_gradient(torch.ones(600), hold(fine, broken)).norm().isfinite()


def hold(*gradients: torch.Tensor) -> HeldGradient:
    held = new_held_gradient(gradients[0])
    for number, gradient in enumerate(gradients):
        hold_gradient(gradient, held, number, first=number == 0)
    return held


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_plain_version(dtype: torch.dtype, kernel_device: str) -> None:
    from chaccu.train.held_kernel import launch_hold, launch_release

    gradients = parts(4)
    exact, spread = torch.stack(gradients).sum(dim=0), spread_of(gradients)
    errors = []
    for seed in range(10):
        held = new_held_gradient(gradients[0].to(kernel_device))
        held.scales.fill_(float("nan"))
        for number, gradient in enumerate(gradients[:-1]):
            launch_hold(gradient.to(dtype).to(kernel_device), held, seed * 100 + number, first=number == 0)
        total = gradients[-1].to(dtype).to(kernel_device, copy=True)
        launch_release(total, held)
        errors.append(total.cpu().float() - exact)
    # bfloat16 rounds the sum once more: to the nearest, by at most 2⁻⁸ of itself.
    last = 0.0 if dtype == torch.float32 else 2.0**-8
    assert (torch.stack(errors).square().mean(dim=0).sqrt() <= 2.5 * spread + last * (exact.abs() + 5 * spread)).all()
    assert (torch.stack(errors).mean(dim=0).norm() <= 2 * spread.norm() / 10**0.5 + last * exact.norm()).all()
    broken = gradients[0].to(kernel_device).clone()
    for bad in (float("nan"), float("inf")):
        broken[300] = bad
        launch_hold(broken, held, 1, first=True)
        total = gradients[1].to(kernel_device).clone()
        launch_release(total, held)
        assert not total.norm().isfinite()
