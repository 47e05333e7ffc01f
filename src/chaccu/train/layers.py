"""A model's decoder layers: compiled one by one, and those that recompute their activations in the backward pass.

Invariant: what a layer computes is not changed, nor are its parameters' names. Layers are alike, so one compiled graph serves
them all: compiling takes seconds, not minutes. A layer that is checkpointed (Chen et al. 2016, arXiv:1604.06174) keeps only its
input and runs forward again when its gradients are due.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from chaccu.errors import TrainError

# Of what a compiled layer would keep for its backward pass: with less, norms and activation functions are computed again, which
# costs about one per cent of the time and saves more than a quarter of the memory; matrix products and attention never are.
_LEAN_BUDGET = 0.8


def find_layers(causal: Any) -> list[torch.nn.Module]:
    """The decoder layers of a transformers model, in order. Raises `TrainError` when it does not say what they are."""
    names = set(getattr(causal, "_no_split_modules", None) or ())
    layers = [module for module in causal.modules() if type(module).__name__ in names]
    if not layers:
        raise TrainError(
            f"{type(causal).__name__} does not say which modules are its layers.",
            remedy="set compile: false and activation_checkpointing: none",
        )
    return layers


def compile_layers(layers: list[torch.nn.Module], *, lean: bool) -> None:
    """Compile each layer's forward, for rows of one length. `lean`: keep less for the backward pass."""
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = _LEAN_BUDGET if lean else 1.0
    # A layer that for some reason wants a graph of its own gets it; the default limit would run most layers uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


class Checkpoints:
    """Which of some layers recompute in the backward pass; all of them until told otherwise. Make it after compiling."""

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        self._on = [True] * len(layers)
        for number, layer in enumerate(layers):
            layer.forward = self._wrap(layer.forward, number)

    def __len__(self) -> int:
        return len(self._on)

    @property
    def count(self) -> int:
        """How many layers recompute."""
        return sum(self._on)

    def spread(self, count: int) -> None:
        """Let `count` of the layers recompute, evenly spread."""
        size = len(self._on)
        self._on = [(number + 1) * count // size > number * count // size for number in range(size)]

    def _wrap(self, forward: Callable[..., Any], number: int) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not (self._on[number] and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, determinism_check="none", **kwargs)

        return run


def count_that_fit(free: int, fixed: int, a_layer: int, layers: int) -> int:
    """How many of `layers` may keep their activations, `a_layer` bytes each, in `free` bytes of which `fixed` are spoken for.

    One layer's worth and a half stay free: that of the layer whose gradients are being computed, and its temporaries.
    """
    return max(0, min(layers, int((free - fixed) / max(1, a_layer) - 1.5)))
