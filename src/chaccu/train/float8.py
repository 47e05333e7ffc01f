"""Matrix products of the decoder layers in 8-bit floating point, through torchao.

Weights, activations and gradients stay in 16 bits or more; each product's factors are scaled by their largest value and
rounded to float8 as it is computed (Micikevicius et al. 2022, arXiv:2209.05433: E4M3 forward, E5M2 for the gradients of
outputs). Such products run at almost twice the speed of 16-bit ones on Hopper. The output projection is not touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from chaccu.errors import MissingDependencyError, TrainError

# What a product of float8 factors takes its sides in.
SIDE = 16
_ADA = (8, 9)


def check_float8(device: torch.device) -> None:
    """Raise `TrainError` for a device that has no products of float8 factors."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _ADA:
        raise TrainError(
            f"precision fp8 needs a GPU with float8 products, from Ada and Hopper on; this is {_describe(device)}.",
            remedy="set precision: auto",
        )


def use_float8(layers: Sequence[torch.nn.Module], device: torch.device, *, emulate: bool = False) -> int:
    """Let the linear modules in `layers` multiply in float8; how many do. Those with a side that is no multiple of 16 do not.

    `emulate`: the same rounding with ordinary products, on any processor. Raises `TrainError` for a device that has no such
    products and for layers in which nothing can use them, `MissingDependencyError` without torchao.
    """
    if not emulate:
        check_float8(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise MissingDependencyError("torchao", extra="gpu", needed_for="precision: fp8") from error
    config = Float8LinearConfig(emulate=emulate)
    converted = 0

    def fits(module: torch.nn.Module, _: str) -> bool:
        nonlocal converted
        takes = isinstance(module, torch.nn.Linear) and not (module.in_features % SIDE or module.out_features % SIDE)
        converted += takes
        return takes

    for layer in layers:
        convert_to_float8_training(layer, config=config, module_filter_fn=fits)
    if not converted:
        raise TrainError(
            f"precision fp8 has nothing to work on: no linear module of the layers has sides that are multiples of {SIDE}.",
            remedy="set precision: bf16",
        )
    return converted


def count_float8(model: torch.nn.Module) -> int:
    """How many modules of `model` multiply in float8."""
    return sum(type(module).__name__ == "Float8Linear" for module in model.modules())


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"a {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
