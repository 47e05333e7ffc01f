"""Rows of float32 into ggml's quantised blocks: by llama.cpp's own functions where xllamacpp is installed, else by the `gguf`
package.

The binding has no quantising in its Python part, but its library exports `ggml_quantize_chunk` (ggml.h), a C function of
numbers and pointers alone, which stands on no struct that could change. What it returns, the bytes it wrote, is checked against
the format's size. The `gguf` package knows fewer types.

It ignores which type a tensor should have (`quantize_gguf`).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import TYPE_CHECKING

import msgspec

from chaccu.errors import WeightsError

if TYPE_CHECKING:
    import numpy as np

F32, F16, Q4_0, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 6, 7, 8, 12, 13, 14, 30
_MAX_THREADS = 8
_OF_THE_PACKAGE = frozenset({F32, F16, BF16, Q4_0, Q5_0, Q5_1, Q8_0})


class Quantiser(msgspec.Struct, frozen=True):
    """`name`: whose functions, with the version. `knows`: a ggml type; `quantise`: float32 (rows × columns) and a type to bytes
    (rows × bytes of a row).
    """

    name: str
    knows: Callable[[int], bool]
    quantise: Callable[[np.ndarray, int], np.ndarray]


def find_quantiser() -> Quantiser:
    """llama.cpp's where it is there."""
    chunk = _find_chunk()
    if chunk is None:
        return Quantiser(f"gguf {metadata.version('gguf')}", lambda kind: kind in _OF_THE_PACKAGE, _by_package)
    name = f"llama.cpp of xllamacpp {metadata.version('xllamacpp')}"
    return Quantiser(name, lambda kind: True, lambda values, kind: _by_llama_cpp(chunk, values, kind))


def row_bytes(columns: int, kind: int) -> int:
    """Bytes of a row. Raises `WeightsError` when the columns are no whole number of the type's blocks."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    if columns % block:
        raise WeightsError(
            f"rows of {columns} are no whole blocks of {block}, as {gguf.GGMLQuantizationType(kind).name} has them."
        )
    return int(columns // block * size)


def _find_chunk() -> Callable[..., int] | None:
    try:
        from xllamacpp import xllamacpp
    except ImportError:
        return None
    chunk = getattr(ctypes.CDLL(xllamacpp.__file__), "ggml_quantize_chunk", None)
    if chunk is not None:
        chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        chunk.restype = ctypes.c_size_t
    return chunk


def _by_package(values: np.ndarray, kind: int) -> np.ndarray:
    import gguf
    import numpy as np

    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind))
    return packed.reshape(-1).view(np.uint8).reshape(len(values), -1)


def _by_llama_cpp(chunk: Callable[..., int], values: np.ndarray, kind: int) -> np.ndarray:
    """Runs of rows side by side: the function leaves Python's lock to others."""
    import numpy as np

    if kind in (F32, F16, BF16):
        return _by_package(values, kind)
    rows, columns = values.shape
    size = row_bytes(columns, kind)
    source, target = np.ascontiguousarray(values, np.float32), np.empty((rows, size), np.uint8)
    threads = max(
        1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    )
    step = max(1, -(-rows // threads))

    def run(begin: int) -> int:
        count = min(step, rows - begin)
        return chunk(kind, source.ctypes.data, target.ctypes.data, begin * columns, count, columns, None)

    with ThreadPoolExecutor(threads) as pool:
        written = sum(pool.map(run, range(0, rows, step)))
    if written != target.nbytes:
        raise WeightsError(
            f"llama.cpp's quantiser wrote {written:,} bytes of type {kind} for {rows:,} rows of {columns}; "
            f"{target.nbytes:,} are due.",
            remedy="this version of xllamacpp is not known to Chaccu: install the one that constraints.txt names",
        )
    return target
