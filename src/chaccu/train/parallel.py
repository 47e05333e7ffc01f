"""What is laid around a model that reads as code for one GPU: activation checkpointing, compiled layers (whose products
may be in float8), shards (FSDP2).

This is the one file that applies them, from the inside out. A layer that recomputes calls its compiled forward, because which
layers recompute is chosen anew when the memory is known; FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv:2304.11277) is
outermost: it gathers a layer's weights before its forward or backward pass and lets them go after it.

Each decoder layer is gathered by itself; the embedding, the last norm and the projection together, from before the first layer
until the loss is there. Frozen weights are sharded too, unless they lie in 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from chaccu.train.float8 import use_float8
from chaccu.train.layers import Checkpoints, compile_layers, find_layers
from chaccu.train.processes import Processes
from chaccu.train.recipe import Recipe


def build_mesh(processes: Processes) -> DeviceMesh | None:
    """All processes in one line; None for one alone. All have to call it."""
    return init_device_mesh(processes.device.type, (processes.count,)) if processes.count > 1 else None


def apply_parallel(
    causal: Any, recipe: Recipe, dtype: torch.dtype, mesh: DeviceMesh | None, device: torch.device
) -> Checkpoints | None:
    """Lay around `causal` (a transformers model, its adapters added) what the recipe asks for; its checkpointed layers.

    `dtype`: of the computation; `mesh`: over which to shard (None: not). Parameters are exchanged for their shards: take them
    from the model afterwards.
    """
    wants_layers = recipe.compile or recipe.activation_checkpointing != "none" or mesh is not None
    layers = find_layers(causal) if wants_layers else []
    if recipe.precision == "fp8":
        use_float8(layers, device)
    if recipe.compile:
        compile_layers(layers, lean=recipe.activation_checkpointing != "none")
    checkpoints = None if recipe.activation_checkpointing == "none" else Checkpoints(layers)
    if mesh is not None:
        _shard(causal, layers, dtype, mesh)
    return checkpoints


def _shard(causal: Any, layers: list[torch.nn.Module], dtype: torch.dtype, mesh: DeviceMesh) -> None:
    # Shards keep the dtype that they were loaded in (float32 masters, or 16 bits that are rounded stochastically); weights are
    # gathered, and multiplied, in the computation's; gradients are summed in float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # Weights packed into 4 bits are no numbers to be cast; they are small, and stay whole on every device.
    packed = {parameter for parameter in causal.parameters() if not parameter.is_floating_point()}
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=packed)
    fully_shard(causal, mesh=mesh, mp_policy=policy, ignored_params=packed, reshard_after_forward=False)
    for module in _sharded_modules(causal):
        # The loss is divided by the trained tokens of all processes: gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _sharded_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def bind_loss(causal: Any, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`loss`, with the model's own weights gathered while it runs; it may use them outside of the modules they belong to.

    A model that is not sharded is left as it is.
    """
    if not _sharded_modules(causal):
        return loss
    causal.packed_loss = loss
    register_fsdp_forward_method(causal, "packed_loss")
    bound: Callable[..., torch.Tensor] = causal.packed_loss
    return bound


def count_transient_bytes(causal: Any) -> int:
    """What a sharded model needs on the way of its largest part through the backward pass: gathered in 16 bits, with gradients
    in 16 bits and in 32 to be summed. 0 for one that is not sharded."""
    sizes: dict[Any, int] = {
        module: sum(one.numel() * (8 if one.requires_grad else 2) for one in module.parameters())
        for module in _sharded_modules(causal)
    }
    if not sizes:
        return 0
    layers = [size for module, size in sizes.items() if module is not causal]
    return max(*layers, sizes[causal] - sum(layers))


def gather_weights(full: Any, *, dtype: torch.dtype | None, trained_only: bool) -> dict[str, torch.Tensor] | None:
    """A model's weights in `dtype` (None: as they are), whole and in the processor's memory of process 0, while the others get
    none; None where the model has them so already. All processes have to call it. Tied weights are one tensor under all their
    names."""
    if not _sharded_modules(full):
        if dtype is None or all(one.dtype == dtype for one in full.parameters()):
            return None
        return _cast(full.state_dict(), dtype)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    gathered: dict[str, Any] = get_model_state_dict(full, options=options)
    weights = _cast(gathered, dtype)
    first_names: dict[int, str] = {}
    for name, parameter in full.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if name in weights and first in weights:
            weights[name] = weights[first]
    return weights


def _cast(weights: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """`weights` in the processor's memory, in `dtype` where they are numbers; one that has several names stays one."""
    if dtype is None:
        return weights
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for name, weight in weights.items():
        key = weight.data_ptr(), weight.shape
        if key not in cast:
            cast[key] = weight.to("cpu", dtype if weight.is_floating_point() else weight.dtype)
        weights[name] = cast[key]
    return weights
