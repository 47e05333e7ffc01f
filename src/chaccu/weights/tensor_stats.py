"""Least, greatest, mean and standard deviation of each tensor of a folder or GGUF file, one tensor in memory at a time.

Invariants: values that are not finite are counted and take no part in the rest; sums are in float64; a quantised GGUF tensor is
judged by the values that it stands for, one of safetensors by those that it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch

from chaccu.weights.checkpoint import Progress
from chaccu.weights.inspection import TensorRow
from chaccu.weights.safetensors_file import SafetensorsFile

# 2 MB of 8-byte values, which a processor's cache holds.
_PIECE = 262_144


class TensorStats(msgspec.Struct, frozen=True, kw_only=True):
    """Of the finite values of a tensor; None where it has none. `std`: of the tensor itself, not of a sample."""

    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    non_finite: int


def measure_tensors(
    path: Path, rows: Sequence[TensorRow], *, progress: Progress | None = None
) -> Iterator[tuple[TensorRow, TensorStats]]:
    """The stats of `rows`, which `inspect_weights` found at `path`. Raises `WeightsError` for a dtype that torch does not
    have."""
    folder = path if path.is_dir() else path.parent
    total = sum(row.size_bytes for row in rows)
    done = 0
    for name in dict.fromkeys(row.file for row in rows):
        for row, tensor in _read(folder / name, [row for row in rows if row.file == name]):
            yield row, measure_tensor(tensor)
            done += row.size_bytes
            if progress:
                progress(done, total)


def _read(file: Path, rows: Sequence[TensorRow]) -> Iterator[tuple[TensorRow, torch.Tensor]]:
    if file.suffix == ".gguf":
        from chaccu.weights.gguf_file import GgufFile

        packed = GgufFile(file)
        for row in rows:
            values = packed.dequantized(row.name)
            yield row, torch.from_numpy(values if values.flags.writeable else values.copy())
    else:
        opened = SafetensorsFile(file)
        for row in rows:
            yield row, opened.read(row.name)


def measure_tensor(tensor: torch.Tensor) -> TensorStats:
    """The stats of one tensor; the variance of pieces is put together as by Chan, Golub and LeVeque (1979)."""
    count, mean, squares, non_finite = 0, 0.0, 0.0, 0
    low, high = float("inf"), float("-inf")
    for piece in torch.split(tensor.reshape(-1), _PIECE):
        values = piece.double()
        kept = torch.isfinite(values)
        finite = values if kept.all() else values[kept]
        non_finite += len(values) - len(finite)
        if not len(finite):
            continue
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        piece_mean = float(finite.mean())
        gap, total = piece_mean - mean, count + len(finite)
        deviation = finite - piece_mean
        squares += float(torch.dot(deviation, deviation)) + gap**2 * count * len(finite) / total
        mean += gap * len(finite) / total
        count = total
    if not count:
        return TensorStats(minimum=None, maximum=None, mean=None, std=None, non_finite=non_finite)
    return TensorStats(minimum=low, maximum=high, mean=mean, std=(squares / count) ** 0.5, non_finite=non_finite)
