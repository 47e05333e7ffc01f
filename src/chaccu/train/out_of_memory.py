"""What is said when memory runs out, anywhere in a run: what the device has, what the recipe needs, and what to change.

`memory` has the formulas; here they meet the device and the error. Nothing is retried: a run that fits
only sometimes is no run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from chaccu.errors import TrainError
from chaccu.train.memory import Advice, MemoryEstimate, ModelShape, advise, estimate_memory
from chaccu.train.recipe import Recipe

# What PyTorch and its libraries say where they raise no OutOfMemoryError.
_SAYS_SO = re.compile(r"can't allocate memory|not enough memory|DefaultCPUAllocator|out of memory|_ALLOC_FAILED", re.IGNORECASE)
# Of a device's memory: the rest is the libraries' own, and lost between blocks.
_USABLE = 0.93


@contextlib.contextmanager
def explain_out_of_memory(doing: str, recipe: Recipe, config: Any, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Turn every way in which memory runs out inside into a `TrainError` with figures and remedies; other errors pass.

    `doing`: what the run does there; `config`: the model's, of transformers; `dtype`: what is computed in.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        runs_out = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _SAYS_SO.search(str(error))
        if not runs_out:
            raise
        raise _explain(doing, recipe, config, device, dtype) from error


def _explain(doing: str, recipe: Recipe, config: Any, device: torch.device, dtype: torch.dtype) -> TrainError:
    shape, half = read_shape(config), dtype != torch.float32
    estimate = estimate_memory(recipe, shape, half=half)
    total, used = measure_device(device)
    changes = advise(recipe, shape, int(total * _USABLE), half=half)
    return TrainError(
        f"out of memory while {doing}: {_name(device)} has {_gigabytes(total)}, of which this process had taken "
        f"{_gigabytes(used)}. By estimate the recipe needs {_gigabytes(estimate.peak_bytes)} at its peak: "
        f"{describe_estimate(estimate, recipe, shape)}.",
        remedy=describe_advice(changes, int(total * _USABLE))
        or "a device with more memory, or a smaller model; the recipe has no key left that saves any",
    )


def describe_estimate(estimate: MemoryEstimate, recipe: Recipe, shape: ModelShape) -> str:
    """Its parts in words."""
    kept = "the input of each layer" if recipe.activation_checkpointing != "none" else f"{shape.layers} layers"
    return (
        f"weights {_gigabytes(estimate.weight_bytes)} ({shape.weights:,} of them), gradients "
        f"{_gigabytes(estimate.gradient_bytes)}, moments {_gigabytes(estimate.moment_bytes)}, activations "
        f"{_gigabytes(estimate.activation_bytes)} ({recipe.row_len:,} tokens, {kept}), loss or one layer's backward pass "
        f"{_gigabytes(estimate.working_bytes)}, an update {_gigabytes(estimate.update_bytes)}"
    )


def describe_advice(changes: list[Advice], device_bytes: int) -> str:
    """One line a change; "" without any. Several may be needed: each figure is of that one alone."""
    lines = []
    for advice in changes:
        keys = " ".join(f"{key}={str(value).lower()}" for key, value in advice.changes.items())
        fits = ", which fits" if advice.peak_bytes <= device_bytes else ""
        lines.append(f"{keys}  saves {_gigabytes(advice.saves_bytes)}, to {_gigabytes(advice.peak_bytes)}{fits}")
    return "\n       ".join(lines)


def read_shape(config: Any) -> ModelShape:
    """The shape of the model that `config` (of transformers) describes, counted on one without memory."""
    import transformers

    text = config.get_text_config()
    with torch.device("meta"):
        causal = transformers.AutoModelForCausalLM.from_config(text)  # type: ignore[no-untyped-call]
    ends = {id(causal.get_input_embeddings().weight), id(causal.get_output_embeddings().weight)}
    matrices = [
        module.weight
        for module in causal.modules()
        if isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)) and id(module.weight) not in ends
    ]
    total = sum(parameter.numel() for parameter in causal.parameters())
    heads = int(text.num_attention_heads)
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    linear = sum(matrix.numel() for matrix in matrices)
    return ModelShape(
        layers=int(text.num_hidden_layers),
        width=int(text.hidden_size),
        key_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
        inner_width=int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size),
        vocabulary=int(text.vocab_size),
        linear_weights=linear,
        linear_ends=sum(sum(matrix.shape) for matrix in matrices),
        other_weights=total - linear,
    )


def measure_device(device: torch.device) -> tuple[int, int]:
    """Bytes that the device has, and that this process had taken of it at most."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1], torch.cuda.max_memory_allocated(device)
    return int(psutil.virtual_memory().total), int(psutil.Process().memory_info().rss)


def _name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "this computer"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
