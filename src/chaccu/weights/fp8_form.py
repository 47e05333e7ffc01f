"""Linear weights in eight-bit floating point as vLLM loads them: one scale a weight.

The form is vLLM's `quant_method: fp8` (vllm/model_executor/layers/quantization/fp8.py): `x.weight` in E4M3 (Micikevicius et al.
2022, arXiv:2209.05433), and `x.weight_scale`, a float32 of no dimension; the weight is their product. Activations are scaled as
they come (`activation_scheme: dynamic`), so that no calibration is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from chaccu.weights.checkpoint import Checkpoint
from chaccu.weights.row_pieces import split_rows
from chaccu.weights.safetensors_file import TensorSpec

FP8_METHOD = "fp8"
_SCALE = "_scale"
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def fp8_specs(name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    """What `pack_fp8` makes of a weight, in its order."""
    return [TensorSpec(name, torch.float8_e4m3fn, shape), TensorSpec(name + _SCALE, torch.float32, ())]


def pack_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in fp8, by the names that it has in a checkpoint: its largest value becomes the largest of the format."""
    low, high = torch.aminmax(weight)
    # A weight of zeros alone has any scale.
    scale = max(-float(low), float(high)) / _LARGEST or 1.0
    packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for begin, end in split_rows(tuple(weight.shape)):
        # Beyond the largest value the format has no infinity to round to: 448 · (1 + ε) would become NaN.
        packed[begin:end] = (weight[begin:end].float() / scale).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return {name: packed, name + _SCALE: torch.tensor(scale, dtype=torch.float32)}


def fp8_config(kept: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model's config; `kept`: modules whose weights are left as they are."""
    return {"quant_method": FP8_METHOD, "activation_scheme": "dynamic", "ignored_layers": kept}


def read_fp8(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight of a model by name, those in fp8 as float32."""
    names = checkpoint.entries
    for name, entry in names.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in names:
            continue
        values = checkpoint.read(name)
        if entry.dtype == torch.float8_e4m3fn:
            values = values.float() * checkpoint.read(name + _SCALE)
        yield name, values
