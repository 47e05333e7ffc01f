"""Memory that runs out anywhere in a run ends it with figures and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.errors import TrainError
from chaccu.train.recipe import Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train import model as model_module  # noqa: E402 (torch may be absent)
from chaccu.train import out_of_memory  # noqa: E402
from chaccu.train import run as run_module  # noqa: E402
from chaccu.train.model import TrainableModel  # noqa: E402
from chaccu.train.out_of_memory import explain_out_of_memory, read_shape  # noqa: E402
from chaccu.train.run import train  # noqa: E402
from chaccu.train.step_guard import StepGuard  # noqa: E402

CPU = torch.device("cpu")
ON_CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(ON_CPU)]


def fail(error: BaseException) -> Any:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("place", "name", "doing"),
    [
        (model_module, "load_causal_lm", "loading the model"),
        (TrainableModel, "fit_memory", "training"),
        (TrainableModel, "row_loss", "loading the model"),
        (StepGuard, "unscale", "training"),
        (torch.optim.AdamW, "step", "training"),
    ],
)
def test_wherever_it_runs_out_the_error_has_figures_and_changes(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, doing: str, error: BaseException
) -> None:
    recipe = msgspec.structs.replace(recipe, method="full", micro_batch_tokens=512, max_steps=1)
    monkeypatch.setattr(place, name, fail(error))
    with pytest.raises(TrainError) as caught:
        train(recipe)
    message = str(caught.value)
    weights = sum(parameter.numel() for parameter in causal_at(recipe.model).parameters())
    for part in (
        f"out of memory while {doing}: this computer has",
        "GB, of which this process had taken",
        f"({weights:,} of them)",
        "micro_batch_tokens=256  saves",
        "activation_checkpointing=selective  saves",
        "optimizer=adamw_8bit  saves",
        "method=lora  saves",
        ", which fits",
    ):
        assert part in message, part
    assert caught.value.__cause__ is error
    assert not Path(recipe.output).exists()


def test_other_errors_pass(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "run_steps", fail(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(recipe)


def test_a_real_allocation_that_is_too_large_is_known(recipe: Recipe) -> None:
    config = transformers.AutoConfig.from_pretrained(recipe.model)
    with (
        pytest.raises(TrainError, match="out of memory while training"),
        explain_out_of_memory("training", recipe, config, CPU, torch.float32),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_a_recipe_with_nothing_left_to_change_says_so(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "advise", lambda *_, **__: [])
    config = transformers.AutoConfig.from_pretrained(recipe.model)
    with pytest.raises(TrainError, match="no key left"), explain_out_of_memory("a", recipe, config, CPU, torch.float32):
        raise MemoryError


def test_the_shape_is_counted_as_the_model_is(recipe: Recipe) -> None:
    causal = causal_at(recipe.model)
    shape = read_shape(causal.config)
    assert shape.weights == sum(parameter.numel() for parameter in causal.parameters())
    matrices = [one for name, one in causal.named_parameters() if "layers" in name and one.ndim == 2]
    assert shape.linear_weights == sum(one.numel() for one in matrices)
    assert shape.linear_ends == sum(sum(one.shape) for one in matrices)
    assert (shape.layers, shape.width, shape.key_width, shape.inner_width) == (2, 64, 32, 128)


def test_gpt2_has_a_shape_too() -> None:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    shape = read_shape(config)
    assert shape.weights == sum(one.numel() for one in transformers.GPT2LMHeadModel(config).parameters())
    assert shape.linear_weights == 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert (shape.width, shape.key_width, shape.inner_width) == (32, 32, 128)


def causal_at(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)
