"""The schedule's shape, and which weights decay."""

from __future__ import annotations

import msgspec
import pytest

from chaccu.train.recipe import DataSource, Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.optim import build_optimizer, learning_rate_at  # noqa: E402 (torch may be absent)
from chaccu.train.quantised_moments import decode_mean  # noqa: E402 (torch may be absent)

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
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer([matrix, vector], RECIPE)
    optimizer.set_rate(0.5)
    optimizer.finish_step()
    assert matrix.tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert vector.tolist() == [1.0, 1.0]


EIGHT_BIT = msgspec.structs.replace(RECIPE, method="full", optimizer="adamw_8bit", learning_rate=0.01, max_grad_norm=1e9)


def train_line(recipe: Recipe, steps: int = 4) -> list[list[float]]:
    """Weights of a small regression after some steps, with the norms that were reported last."""
    generator = torch.Generator().manual_seed(0)
    layer, bias = (torch.nn.Parameter(torch.randn(*size, generator=generator)) for size in ((40, 8), (8,)))
    inputs, wanted = torch.randn(16, 40, generator=generator), torch.randn(16, 8, generator=generator)
    optimizer = build_optimizer([layer, bias], recipe)
    norm = torch.zeros(())
    for step in range(1, steps + 1):
        optimizer.set_rate(0.01 * step)
        (inputs @ layer + bias - wanted).square().mean().backward()
        norm = optimizer.clip()
        optimizer.finish_step()
        assert layer.grad is None
    return [layer.flatten().tolist(), bias.tolist(), [norm.item()]]


def test_in_backward_is_the_same_step_where_nothing_is_clipped() -> None:
    in_backward = msgspec.structs.replace(EIGHT_BIT, optimizer_in_backward=True)
    ours, plain = train_line(in_backward), train_line(EIGHT_BIT)
    assert ours[:2] == plain[:2]
    assert ours[2] == pytest.approx(plain[2], rel=1e-5)
    exact = train_line(msgspec.structs.replace(EIGHT_BIT, optimizer="adamw"))
    assert plain[0] == pytest.approx(exact[0], abs=0.01)


def test_in_backward_a_tensor_is_not_clipped_for_gradients_that_have_not_come() -> None:
    big, small = torch.nn.Parameter(torch.zeros(300)), torch.nn.Parameter(torch.zeros(300))
    recipe = msgspec.structs.replace(EIGHT_BIT, optimizer_in_backward=True, max_grad_norm=1.0)
    optimizer = build_optimizer([big, small], recipe)
    (3.0 * big + 0.01 * small).sum().backward()
    norms = torch.tensor([3.0 * 300**0.5, 0.01 * 300**0.5])
    assert optimizer.clip().item() == pytest.approx(norms.norm().item(), rel=1e-5)
    moments = {id(weight.parameter): weight.state for weight in optimizer._weights}  # type: ignore[attr-defined]
    # m after one step is a tenth of the gradient: clipped to a norm of 1 the one, untouched the other.
    assert decode_mean(moments[id(big)]).norm().item() == pytest.approx(0.1, rel=0.01)
    assert decode_mean(moments[id(small)]).norm().item() == pytest.approx(0.1 * norms[1].item(), rel=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_skipped_step_leaves_weights_and_moments(optimizer: str) -> None:
    """The step after it is the step that would have been without it, to the bit."""
    recipe = msgspec.structs.replace(EIGHT_BIT, optimizer=optimizer)
    weights = []
    for skips in (True, False):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 300))
        ours = build_optimizer([weight], recipe)
        for factor in (1.0, float("inf"), 2.0) if skips else (1.0, 2.0):
            (factor * weight.square()).sum().backward()
            if torch.isfinite(ours.clip()):
                ours.finish_step()
            else:
                ours.skip_step()
            assert weight.grad is None
        weights.append(weight.tolist())
    assert weights[0] == weights[1]


def test_in_backward_nothing_is_updated_from_the_first_gradient_that_is_not_finite_on() -> None:
    first, bad, last = (torch.nn.Parameter(torch.ones(300)) for _ in range(3))
    optimizer = build_optimizer([first, bad, last], msgspec.structs.replace(EIGHT_BIT, optimizer_in_backward=True))
    for one, factor in ((first, 1.0), (bad, float("nan")), (last, 1.0)):
        (factor * one).sum().backward()
    assert not torch.isfinite(optimizer.clip())
    optimizer.skip_step()
    assert [(one == 1).all().item() for one in (first, bad, last)] == [False, True, True]
    (first + bad + last).sum().backward()
    assert torch.isfinite(optimizer.clip())
    optimizer.finish_step()
    assert [(one == 1).any().item() for one in (first, bad, last)] == [False, False, False]


@pytest.mark.parametrize("loss", [float("inf"), float("nan")])
def test_in_backward_a_loss_that_is_not_finite_updates_nothing(loss: float) -> None:
    weight = torch.nn.Parameter(torch.ones(300))
    optimizer = build_optimizer([weight], msgspec.structs.replace(EIGHT_BIT, optimizer_in_backward=True))
    optimizer.watch(torch.tensor(loss))
    weight.sum().backward()
    optimizer.clip()
    optimizer.skip_step()
    assert (weight == 1).all()
