"""Linear weights in eight-bit integers as torchao writes them into safetensors, which transformers loads: a scale for each row.

torchao's own functions take a weight apart and say, in the file's metadata, what it was; here that is done one weight at a
time. Invariant: names, dtypes and metadata of a weight follow from its shape and dtype alone, so that they are known
beforehand.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from chaccu.errors import MissingDependencyError
from chaccu.weights.safetensors_file import TensorSpec


class Int8Form:
    """torchao's `Int8WeightOnlyConfig`, a scale for each row. Raises `MissingDependencyError` without torchao."""

    def __init__(self) -> None:
        try:
            from torchao.core.config import config_to_dict
            from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise MissingDependencyError("torchao", extra="gpu", needed_for="--type int8") from error
        self._config = Int8WeightOnlyConfig(set_inductor_config=False)
        self._quantize, self._flatten, self._to_dict = quantize_, flatten_tensor_state_dict, config_to_dict
        self._known: dict[tuple[tuple[int, ...], torch.dtype], tuple[dict[str, TensorSpec], str]] = {}

    def pack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a weight, by the names that they have in a checkpoint."""
        return self._flatten_one(name, weight)[0]

    def _flatten_one(self, name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], str]:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        self._quantize(torch.nn.Sequential(layer), self._config)
        parts, metadata = self._flatten({name: layer.weight.data})
        return {part: tensor.contiguous() for part, tensor in parts.items()}, metadata[name]

    def specs(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[TensorSpec]:
        """What `pack` makes of a weight, in its order."""
        specs, _ = self._describe(shape, dtype)
        stem = name.removesuffix("weight")
        return [TensorSpec(stem + part, spec.dtype, spec.shape) for part, spec in specs.items()]

    def _describe(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, TensorSpec], str]:
        if (shape, dtype) not in self._known:
            parts, metadata = self._flatten_one("x.weight", torch.ones(shape, dtype=dtype))
            specs = {
                name.removeprefix("x."): TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()
            }
            self._known[shape, dtype] = specs, metadata
        return self._known[shape, dtype]

    def metadata(self, packed: dict[str, tuple[tuple[int, ...], torch.dtype]], plain: list[str]) -> dict[str, str]:
        """What every file says of the model's weights: `packed`, by shape and dtype, and those that are `plain`."""
        said = {name: self._describe(shape, dtype)[1] for name, (shape, dtype) in packed.items()}
        said |= {name: json.dumps({"_type": "Tensor"}) for name in plain}
        return {**said, "tensor_names": json.dumps(list(said))}

    def config(self, kept: list[str]) -> dict[str, Any]:
        """The `quantization_config` of a model's config; `kept`: modules whose weights are left as they are."""
        return {
            "quant_method": "torchao",
            "quant_type": {"default": self._to_dict(self._config)},
            "modules_to_not_convert": kept,
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }
