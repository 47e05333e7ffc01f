"""Checkpointed layers give the gradients of the others; as many keep their activations as fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.errors import TrainError
from chaccu.train.pack import PackedRow
from chaccu.train.recipe import Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train.layers import Checkpoints, count_that_fit, find_layers  # noqa: E402 (torch may be absent)
from chaccu.train.model import TrainableModel  # noqa: E402 (torch may be absent)
from chaccu.train.run import train  # noqa: E402 (torch may be absent)

CPU = torch.device("cpu")
ROW = PackedRow([*range(1, 30)], [1] * 29, [12, 17])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpoints_change_no_gradient(recipe: Recipe, method: str) -> None:
    losses, gradients = [], []
    for checkpointing in ("none", "selective", "full"):
        changed = {"method": method, "activation_checkpointing": checkpointing}
        model = TrainableModel(msgspec.convert({**msgspec.to_builtins(recipe), **changed}, Recipe), CPU)
        loss = model.row_loss(ROW)
        loss.backward()
        losses.append(loss.item())
        gradients.append([one.grad for one in model.parameters if one.grad is not None])
    assert losses[1:] == [losses[0]] * 2
    for others in gradients[1:]:
        for one, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(one, other)


def test_layers_that_recompute_are_spread_evenly_and_run_twice() -> None:
    runs = []

    class Layer(torch.nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            runs.append(self.number)
            return value.sin()

    layers = [Layer(number) for number in range(6)]
    checkpoints = Checkpoints(list(layers))
    assert (len(checkpoints), checkpoints.count) == (6, 6)
    for count, twice in ((0, []), (2, [2, 5]), (3, [1, 3, 5]), (6, [0, 1, 2, 3, 4, 5])):
        checkpoints.spread(count)
        assert checkpoints.count == count
        runs.clear()
        value = torch.ones(3, requires_grad=True)
        out = value
        for layer in layers:
            out = layer(out)
        out.sum().backward()
        assert runs == [*range(6), *reversed(twice)]
    with torch.no_grad():
        runs.clear()
        layers[0](torch.ones(3))
    assert runs == [0]


def test_as_many_layers_keep_theirs_as_fit() -> None:
    assert count_that_fit(free=1000, fixed=400, a_layer=100, layers=32) == 4
    assert count_that_fit(free=1000, fixed=990, a_layer=100, layers=32) == 0
    assert count_that_fit(free=9000, fixed=400, a_layer=100, layers=32) == 32


def test_a_model_without_named_layers_is_refused() -> None:
    with pytest.raises(TrainError, match="does not say which modules are its layers"):
        find_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compile": True}, "compile: true needs a GPU"),
        ({"compile": True, "precision": "fp8", "method": "full"}, "precision fp8 needs a GPU"),
    ],
)
def test_what_wants_a_gpu_is_refused_before_anything_is_encoded_or_loaded(
    recipe: Recipe, llama: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("it was encoded or loaded")

    monkeypatch.setattr("chaccu.train.run.encode_sources", load)
    monkeypatch.setattr("chaccu.train.model.load_causal_lm", load)
    changed = msgspec.structs.replace(recipe, **fields)
    with pytest.raises(TrainError, match=message):
        train(changed)
    with pytest.raises(TrainError, match=message):
        TrainableModel(changed, CPU)
