"""Layers that multiply in float8: near the exact ones, the same weights, and refused where there is nothing to gain."""

from __future__ import annotations

import copy

import msgspec
import pytest

from chaccu.errors import MissingDependencyError, TrainError
from chaccu.train.pack import PackedRow
from chaccu.train.recipe import Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.float8 import use_float8  # noqa: E402 (torch may be absent)

CPU = torch.device("cpu")


def build_layer() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64, bias=False))


def test_products_and_gradients_are_near_the_exact_ones() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    exact = build_layer()
    rounded = copy.deepcopy(exact)
    parameters = list(rounded.parameters())
    assert use_float8([rounded], CPU, emulate=True) == 2
    assert [id(one) for one in rounded.parameters()] == [id(one) for one in parameters]
    states = torch.randn(32, 64)
    for layer in (exact, rounded):
        layer(states).square().sum().backward()
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        gap = float((one.grad - other.grad).norm() / one.grad.norm())
        # E4M3 keeps three bits behind the point, E5M2 two: each factor is off by a few per cent, at random.
        assert 1e-4 < gap < 0.1
    assert rounded.state_dict().keys() == exact.state_dict().keys()


def test_sides_that_float8_cannot_take_stay_as_they_are() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    layer = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Linear(32, 32))
    assert use_float8([layer], CPU, emulate=True) == 1
    assert type(layer[0]) is torch.nn.Linear


def test_a_processor_without_such_products_is_refused() -> None:
    with pytest.raises(TrainError, match="this is a CPU"):
        use_float8([build_layer()], CPU)


def test_layers_that_cannot_multiply_in_float8_are_refused() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    with pytest.raises(TrainError, match="multiples of 16"):
        use_float8([torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.LayerNorm(16))], CPU, emulate=True)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    with pytest.raises(MissingDependencyError, match="gpu"):
        use_float8([build_layer()], CPU, emulate=True)


@pytest.mark.gpu
def test_a_compiled_model_trains_in_float8(recipe: Recipe) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    pytest.importorskip("torchao", reason="torchao is not installed")
    from chaccu.train.loop import run_steps
    from chaccu.train.model import TrainableModel

    losses = {}
    for precision in ("bf16", "fp8"):
        changed = {"method": "full", "compile": True, "precision": precision, "learning_rate": 1e-3, "num_train_epochs": 8}
        ours = msgspec.convert({**msgspec.to_builtins(recipe), **changed}, Recipe)
        row = PackedRow([*range(1, 200)], [1] * 199, [120, 79])
        losses[precision] = [step.loss for step in run_steps(TrainableModel(ours, torch.device("cuda")), [row], ours)]
    assert losses["fp8"][-1] < losses["fp8"][0] - 0.2
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.03)
