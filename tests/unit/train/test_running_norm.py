"""What clips gradients that come one by one: the norm as far as it is known, and the kernels that follow it."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.running_norm import RunningNorm  # noqa: E402 (torch may be absent)

CPU = torch.device("cpu")


def arrive(norm: RunningNorm, *lengths: float) -> list[float]:
    """The factors of a step's gradients, of which number k has the norm `lengths[k]`; the last comes first."""
    factors = {}
    for number in reversed(range(len(lengths))):
        gradient = torch.full((100,), lengths[number] / 10)
        factors[number] = float(norm.arrive(number, gradient, gradient))
    return [factors[number] for number in range(len(lengths))]


def test_a_factor_is_the_limit_over_what_is_known() -> None:
    norm = RunningNorm(2, 1.0, CPU)
    assert arrive(norm, 3.0, 4.0) == pytest.approx([1 / 5, 1 / 4], rel=1e-5)
    assert float(norm.close()) == pytest.approx(5.0)
    norm.begin_step()
    assert arrive(norm, 3.0, 4.0) == pytest.approx([1 / 5, 1 / 5], rel=1e-5)
    norm.close()
    norm.begin_step()
    # Both shrank: the first to come is still scaled by what was; small ones are never made larger.
    assert arrive(norm, 0.0, 0.4) == pytest.approx([1.0, 1 / (9 + 0.16) ** 0.5], rel=1e-4)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_after_a_value_that_is_not_finite_every_factor_of_the_step_is_nan_and_it_is_not_remembered(wrong: float) -> None:
    norm = RunningNorm(3, 1.0, CPU)
    arrive(norm, 3.0, 4.0, 12.0)
    norm.close()
    norm.begin_step()
    factors = arrive(norm, 3.0, wrong, 12.0)
    assert [math.isnan(factor) for factor in factors] == [True, True, False]
    assert not math.isfinite(float(norm.close()))
    norm.begin_step()
    assert arrive(norm, 3.0, 4.0, 12.0) == pytest.approx([1 / 13] * 3, rel=1e-5)
    norm.watch(torch.tensor(wrong))
    assert all(math.isnan(factor) for factor in arrive(norm, 3.0, 4.0, 12.0))


def test_nothing_that_came_is_told_from_a_norm_of_zero() -> None:
    norm = RunningNorm(1, 1.0, CPU)
    assert norm.close() is None
    assert arrive(norm, 0.0) == [1.0]
    assert float(norm.close()) == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_plain_version(dtype: torch.dtype, kernel_device: str) -> None:
    from chaccu.train.norm_kernel import launch_arrive, new_partial_sums

    sizes = (1, 300, 5000, 4096 * 40 + 7)
    plain = RunningNorm(len(sizes), 1.0, CPU)
    squares, before = torch.zeros(2, len(sizes), device=kernel_device)
    known, nothing, factor = torch.zeros(3, device=kernel_device)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for number, size in enumerate(sizes):
            gradient = (torch.randn(size, generator=generator) * 10.0 ** (number - 2)).to(dtype)
            if step == 2 and number == 1:
                gradient[7] = math.inf
            theirs = plain.arrive(number, gradient, gradient)
            ours = gradient.to(kernel_device)
            launch_arrive(ours, new_partial_sums(ours), (squares, before, known, nothing, factor), number, 1.0)
            torch.testing.assert_close(factor.cpu(), theirs, rtol=1e-4, atol=0, equal_nan=True)
        norm = plain.close()
        assert float(squares.sum().sqrt()) == pytest.approx(float(norm), rel=1e-4)
        plain.begin_step()
        before.copy_(squares)
        known.copy_(before.sum())
        nothing.zero_()
