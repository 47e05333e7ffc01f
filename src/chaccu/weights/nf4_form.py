"""Linear weights in four bits as bitsandbytes keeps them in safetensors, which transformers loads: unpacked with torch alone,
packed with bitsandbytes.

A weight W of `x.weight` is its codes, two a byte with the first in the upper half; each is a level of `quant_map`, times the
largest value of its block (`absmax`). With double quantisation (Dettmers et al. 2023, arXiv:2305.14314) these are in 8 bits: a
level of `nested_quant_map`, times that of 256 blocks (`nested_absmax`), plus an offset. What is no tensor lies as JSON in
`quant_state.bitsandbytes__nf4`.

Invariants: rows are unpacked and packed piece by piece; what is packed here is equal, bit for bit, to what bitsandbytes makes
of the whole weight. Conv1D's weights, which are packed turned over, are not dealt with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chaccu.errors import MissingDependencyError, WeightsError
from chaccu.weights.checkpoint import Checkpoint, require_finite
from chaccu.weights.row_pieces import Rows, split_rows
from chaccu.weights.safetensors_file import TensorSpec

_STATE = ".quant_state.bitsandbytes__"
_BLOCK, _GROUP = 64, 256
# The state's JSON is filled up with blanks to this size, so that it is known before the offset in it.
_STATE_BYTES = 256


class PackedWeight:
    """One packed weight: `shape` and `dtype` are those that it had, `parts` the names of its tensors, which `read` gives;
    `where` is for errors.

    Raises `WeightsError` when its state is damaged.
    """

    def __init__(self, name: str, kind: str, parts: list[str], read: Callable[[str], torch.Tensor], where: Path) -> None:
        self.name, self.kind, self.parts = name, kind, parts
        self._read, self._where = read, where
        try:
            self._state: dict[str, Any] = json.loads(bytes(read(f"{name}{_STATE}{kind}").numpy()))
            self.shape: tuple[int, ...] = tuple(self._state["shape"])
            self.dtype: torch.dtype = getattr(torch, self._state["dtype"])
            self.block = int(self._state["blocksize"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{name}{_STATE}{kind} in {where} is damaged ({error}).", remedy="fetch it again") from error

    def open(self) -> Rows:
        """Read the codes and scales; gives a function for the rows from `begin` to before `end`, in float32, where `begin` is
        one of `split_rows`. Raises `WeightsError` when a scale is not finite or a part has another size.
        """
        codes = self._part("").reshape(-1).view(torch.uint8)
        scales = self._scales()
        columns = math.prod(self.shape[1:])
        values = self.shape[0] * columns
        if len(codes) != (values + 1) // 2 or len(scales) != -(-values // self.block):
            raise WeightsError(f"{self.name} in {self._where} has {len(codes):,} bytes for {values:,} weights.")
        levels = self._part(".quant_map").float()
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)

        def rows(begin: int, end: int) -> torch.Tensor:
            first, last = begin * columns, end * columns
            flat = pairs.index_select(0, codes[first // 2 : (last + 1) // 2].int()).reshape(-1)[: last - first]
            blocks = scales[first // self.block : -(-last // self.block)]
            whole = len(flat) // self.block * self.block
            flat[:whole].view(-1, self.block).mul_(blocks[: whole // self.block, None])
            if whole < len(flat):
                flat[whole:] *= blocks[-1]
            return flat.view(end - begin, columns)

        return rows

    def _scales(self) -> torch.Tensor:
        """The largest value of each block, in float32."""
        scales = self._part(".absmax")
        if f"{self.name}.nested_absmax" in self.parts:
            group = int(self._state["nested_blocksize"])
            groups = self._part(".nested_absmax").float().repeat_interleave(group)[: len(scales)]
            scales = self._part(".nested_quant_map").float()[scales.int()] * groups + float(self._state["nested_offset"])
        require_finite(scales, f"{self.name}.absmax", self._where)
        return scales.float()

    def _part(self, ending: str) -> torch.Tensor:
        if self.name + ending not in self.parts:
            raise WeightsError(f"{self._where} has no {self.name + ending}.", remedy="fetch it again")
        return self._read(self.name + ending)


def find_packed(checkpoint: Checkpoint) -> dict[str, PackedWeight]:
    """The weights that lie in four bits, by name."""
    entries = checkpoint.entries
    found: dict[str, PackedWeight] = {}
    for entry in entries:
        name, state, kind = entry.partition(_STATE)
        if state:
            parts = [part for part in entries if part == name or part.startswith(f"{name}.")]
            found[name] = PackedWeight(name, kind, parts, checkpoint.read, checkpoint.folder)
    return found


def packed_specs(name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    """What `pack_rows` makes of a weight, in its order."""
    values = math.prod(shape)
    blocks = -(-values // _BLOCK)
    return [
        TensorSpec(name, torch.uint8, ((values + 1) // 2, 1)),
        TensorSpec(f"{name}.absmax", torch.uint8, (blocks,)),
        TensorSpec(f"{name}.nested_absmax", torch.float32, (-(-blocks // _GROUP),)),
        TensorSpec(f"{name}.nested_quant_map", torch.float32, (256,)),
        TensorSpec(f"{name}.quant_map", torch.float32, (16,)),
        TensorSpec(f"{name}{_STATE}nf4", torch.uint8, (_STATE_BYTES,)),
    ]


def pack_rows(name: str, shape: tuple[int, ...], dtype: torch.dtype, rows: Rows) -> dict[str, torch.Tensor]:
    """A weight in nf4 with double quantisation, by the names that it has in a checkpoint; `rows(begin, end)` gives its rows.

    Raises `MissingDependencyError` without bitsandbytes.
    """
    functional = require_bitsandbytes("nf4").functional
    codes, scales = [], []
    for begin, end in split_rows(shape):
        packed, state = functional.quantize_4bit(rows(begin, end).contiguous(), blocksize=_BLOCK, quant_type="nf4")
        codes.append(packed)
        scales.append(state.absmax)
    largest = torch.cat(scales)
    offset = largest.mean()
    absmax, nested = functional.quantize_blockwise(largest - offset, blocksize=_GROUP)
    facts = {
        "quant_type": "nf4",
        "blocksize": _BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "nested_blocksize": _GROUP,
        "nested_dtype": "float32",
        "nested_offset": offset.item(),
    }
    text = json.dumps(facts).encode().ljust(_STATE_BYTES)
    parts = [
        torch.cat(codes),
        absmax,
        nested.absmax,
        nested.code,
        state.code,
        torch.frombuffer(bytearray(text), dtype=torch.uint8),
    ]
    return {spec.name: part for spec, part in zip(packed_specs(name, shape), parts, strict=True)}


def nf4_config(dtype: torch.dtype, kept: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model's config: products in `dtype`; `kept`: modules whose weights are left as they
    are.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": kept,
    }


def require_bitsandbytes(what: str) -> Any:
    """The module. Raises `MissingDependencyError`: `what` needs it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingDependencyError("bitsandbytes", extra="gpu", needed_for=what) from error
    return bitsandbytes
