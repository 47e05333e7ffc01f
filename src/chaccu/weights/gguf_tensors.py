"""The values of tensors between Hugging Face's arrangement and GGUF's, and between torch's dtypes and ggml's packed types.

Invariants: values pass through float32 in blocks of rows, so that beside the tensor read and the tensor made little is in
memory; a value that a type cannot hold is an error, never an infinity. The quantised formats are the `gguf` package's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from chaccu.errors import WeightsError
from chaccu.weights.gguf_architectures import Architecture, find_architecture, head_count
from chaccu.weights.gguf_file import GgufFile, packed_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
TYPES = {"f32": F32, "f16": F16, "q8_0": Q8_0, "bf16": BF16}
_Q8_0_BLOCK = 32
_BLOCK_VALUES = 1 << 21


class Arrangement(msgspec.Struct, frozen=True):
    """How GGUF has the values of one tensor: with `added` to each, and with the rotary halves of every `head_rows` rows
    interleaved (0: as they are)."""

    added: float = 0.0
    head_rows: int = 0

    def to_gguf(self, values: np.ndarray) -> np.ndarray:
        """Whole heads of float32 values as Hugging Face has them, as GGUF has them."""
        if self.head_rows:
            return swap_rotary_halves(values, values.shape[0] // self.head_rows, inverse=False)
        return values + self.added if self.added else values

    def to_hf(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `to_gguf`."""
        if self.head_rows:
            return swap_rotary_halves(values, values.shape[0] // self.head_rows, inverse=True)
        return values - self.added if self.added else values


def find_arrangement(architecture: Architecture, name: str, rows: int, heads: int, kv_heads: int) -> Arrangement:
    """Of the tensor that GGUF calls `name`."""
    if architecture.norm_offset and name.endswith("norm.weight"):
        return Arrangement(added=1.0)
    if architecture.permutes_qk and (".attn_q." in name or ".attn_k." in name):
        return Arrangement(head_rows=rows // head_count(name, heads, kv_heads))
    return Arrangement()


def arrangement_in(file: GgufFile, name: str) -> Arrangement:
    """Of a tensor of a GGUF file."""
    heads = int(file.require(f"{file.architecture}.attention.head_count"))
    kv_heads = int(file.get(f"{file.architecture}.attention.head_count_kv", heads))
    return find_arrangement(find_architecture(file), name, file.tensors[name].shape[0], heads, kv_heads)


def hf_tensor(file: GgufFile, name: str) -> np.ndarray:
    """A GGUF tensor as float32 in Hugging Face's arrangement."""
    return arrangement_in(file, name).to_hf(file.dequantized(name))


def gguf_values(file: GgufFile, name: str, values: np.ndarray) -> np.ndarray:
    """The inverse of `hf_tensor`: float32 values in Hugging Face's arrangement, as GGUF stores them."""
    return arrangement_in(file, name).to_gguf(values)


def swap_rotary_halves(values: np.ndarray, heads: int, *, inverse: bool) -> np.ndarray:
    """Rows of a query or key projection between Hugging Face's order (two halves) and GGUF's (interleaved pairs)."""
    import numpy as np

    half = values.shape[0] // heads // 2
    split = (heads, half, 2) if inverse else (heads, 2, half)
    return np.ascontiguousarray(values.reshape(*split, -1).swapaxes(1, 2).reshape(values.shape))


def choose_type(shape: tuple[int, ...], wanted: int) -> int:
    """The ggml type of a tensor in a file of type `wanted`: vectors stay float32, rows that make no whole blocks become
    float16."""
    if len(shape) < 2:
        return F32
    return F16 if wanted == Q8_0 and shape[-1] % _Q8_0_BLOCK else wanted


def pack_tensor(tensor: torch.Tensor, type_id: int, arrangement: Arrangement, name: str) -> np.ndarray:
    """The packed bytes of a Hugging Face tensor, uint8. Raises `WeightsError` for a value that the type does not hold."""
    import numpy as np

    shape = tuple(tensor.shape)
    packed = np.empty(packed_bytes(shape, type_id), np.uint8)
    row_bytes = packed.nbytes // shape[0]
    for begin, end in row_blocks(shape, arrangement):
        values = arrangement.to_gguf(tensor[begin:end].float().numpy())
        packed[begin * row_bytes : end * row_bytes] = _encode(values, type_id, name).reshape(-1)
    return packed


def _encode(values: np.ndarray, type_id: int, name: str) -> np.ndarray:
    import gguf
    import numpy as np
    import torch

    if type_id == F32:
        return np.ascontiguousarray(values, np.float32).view(np.uint8)
    if type_id == Q8_0:
        return np.asarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0))
    return narrow(torch.from_numpy(values), {F16: torch.float16, BF16: torch.bfloat16}[type_id], name).view(torch.uint8).numpy()


def narrow(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`values` in `dtype`. Raises `WeightsError` naming the tensor when one of them is not finite, or becomes infinite."""
    import torch

    made = values.to(dtype)
    if not values.numel() or torch.isfinite(torch.stack(torch.aminmax(made))).all():
        return made
    largest = float(values.abs().max())
    if not math.isfinite(largest):
        raise WeightsError(f"{name} holds values that are not finite.", remedy="fetch or train it again")
    raise WeightsError(
        f"{name} has values up to {largest:g}; the largest of {str(dtype).removeprefix('torch.')} is "
        f"{torch.finfo(dtype).max:g}.",
        remedy="choose bf16 or f32",
    )


def unpack_tensor(file: GgufFile, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a GGUF file as Hugging Face has it, in `dtype`."""
    import gguf
    import torch

    entry = file.tensors[name]
    arrangement, kind = arrangement_in(file, name), gguf.GGMLQuantizationType(entry.type_id)
    packed = file.packed(name)
    made = torch.empty(entry.shape, dtype=dtype)
    row_bytes = packed.nbytes // entry.shape[0]
    for begin, end in row_blocks(entry.shape, arrangement):
        rows = packed[begin * row_bytes : end * row_bytes].reshape(end - begin if len(entry.shape) > 1 else 1, -1)
        values = gguf.quants.dequantize(rows, kind).reshape(end - begin, *entry.shape[1:])
        made[begin:end] = narrow(torch.from_numpy(arrangement.to_hf(values)), dtype, name)
    return made


def row_blocks(shape: tuple[int, ...], arrangement: Arrangement) -> Iterator[tuple[int, int]]:
    """Ranges of rows of some millions of values, whole heads each; a vector is one."""
    rows = shape[0]
    step = max(1, _BLOCK_VALUES // math.prod(shape[1:])) if len(shape) > 1 else rows
    if arrangement.head_rows:
        step = max(1, step // arrangement.head_rows) * arrangement.head_rows
    return ((begin, min(begin + step, rows)) for begin in range(0, rows, step or 1))
