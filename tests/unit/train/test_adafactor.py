"""Adafactor around transformers' own: the same numbers in float32, and what bfloat16 would lose is kept."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
optimization = pytest.importorskip("transformers.optimization", reason="transformers is not installed")

from chaccu.train.adafactor import new_factors, step_parameter  # noqa: E402 (torch may be absent)
from chaccu.train.adam import Rates  # noqa: E402

ONE = torch.ones(())
NAN = torch.full((), float("nan"))


def rates(step: int, rate: float = 1e-2, decay: float = 0.1) -> Rates:
    return Rates(rate, 0.9, 0.999, 1e-8, decay, step)


@pytest.mark.parametrize("shape", [(40, 30), (50,)])
def test_float32_weights_go_where_transformers_takes_them(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    begin = torch.randn(*shape, generator=generator)
    ours, theirs = begin.clone(), torch.nn.Parameter(begin.clone())
    factors = new_factors(ours)
    trainer = optimization.Adafactor([theirs], lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False)
    for step in range(1, 21):
        gradient = torch.randn(*shape, generator=generator) * 1e-6
        step_parameter(ours, gradient, factors, rates(step), step, ONE)
        theirs.grad = gradient
        trainer.step()
    assert torch.equal(ours, theirs)
    # The first updates are of the size of the rate, however small gradients are, and whatever the weight.
    assert 0.001 < (ours - begin).abs().mean() < 0.2


def test_a_matrix_is_remembered_by_a_row_and_a_column_and_no_copy_stays() -> None:
    weight = torch.randn(40, 30).bfloat16()
    inner, stand_in = factors = new_factors(weight)
    step_parameter(weight, torch.randn(40, 30).bfloat16(), factors, rates(1), 1, ONE)
    kept = [one for one in inner.state[stand_in].values() if isinstance(one, torch.Tensor)]
    assert sum(one.numel() for one in kept) == 40 + 30 + 1  # and the weight's own size, which is not used here
    assert stand_in.numel() == 0
    assert stand_in.grad is None


def test_bfloat16_weights_lose_no_small_update() -> None:
    begin = torch.ones(64, 64, dtype=torch.bfloat16)
    ours, theirs = begin.clone(), torch.nn.Parameter(begin.clone())
    factors = new_factors(ours)
    trainer = optimization.Adafactor([theirs], lr=1e-4, scale_parameter=False, relative_step=False)
    for step in range(1, 101):
        gradient = torch.ones(64, 64, dtype=torch.bfloat16)
        step_parameter(ours, gradient, factors, rates(step, 1e-4, 0.0), step, ONE)
        theirs.grad = gradient
        trainer.step()
    assert torch.equal(theirs, begin)
    assert ours.float().mean().item() == pytest.approx(1.0 - 100 * 1e-4, abs=5e-4)


def test_what_is_not_a_number_in_the_scale_leaves_all_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(20, 30, generator=generator) for _ in range(2)]
    skipped, plain = (torch.ones(20, 30, dtype=torch.bfloat16) for _ in range(2))
    for weight in (skipped, plain):
        factors = new_factors(weight)
        if weight is skipped:
            step_parameter(weight, torch.full((20, 30), float("inf")), factors, rates(1), 9, NAN)
            assert torch.equal(weight, torch.ones_like(weight))
        for step, gradient in enumerate(gradients, 1):
            before = weight.clone()
            step_parameter(weight, gradient, factors, rates(step), step, ONE)
            assert weight.isfinite().all()
            assert not torch.equal(weight, before)
        state = [one.clone() for one in factors.inner.state[factors.stand_in].values() if isinstance(one, torch.Tensor)][:2]
        step_parameter(weight, torch.full((20, 30), float("nan")), factors, rates(3), 3, NAN)
        after = [one for one in factors.inner.state[factors.stand_in].values() if isinstance(one, torch.Tensor)][:2]
        assert all(map(torch.equal, state, after))
