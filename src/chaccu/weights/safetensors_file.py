"""safetensors files, read and written one tensor at a time.

The format is safetensors' own (github.com/huggingface/safetensors, README, "Format"): eight bytes of header length, a JSON
header, the tensors' bytes. The library's reader maps the whole file, whose pages count as the process's memory, and its writer
wants all tensors at once; here neither holds more than the tensor in hand.

Invariants: a file that is cut off, or whose header contradicts itself, is refused when it is opened; what is written is what
was announced, tensor by tensor, or an error.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import torch

from chaccu.artifact import FileEntry, storage_errors
from chaccu.errors import WeightsError
from chaccu.weights.hashed_file import HashedFile
from chaccu.weights.safetensors_header import HeaderEntry, read_header

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


class TensorSpec(msgspec.Struct, frozen=True):
    """What a tensor will be: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorEntry(TensorSpec, frozen=True):
    """A tensor of a file; its bytes begin at `begin`, counted from the file's start."""

    begin: int


class SafetensorsFile:
    """A safetensors file, opened for reading.

    Raises `WeightsError` when it is none, or is cut off, `StorageError` when it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, entries = read_header(path)
        self.entries = {entry.name: _to_torch(entry, path) for entry in entries}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own. Raises `StorageError`, or `WeightsError` when the file shrank meanwhile."""
        entry = self.entries[name]
        return self.read_bytes(name, 0, entry.size_bytes).view(entry.dtype).reshape(entry.shape)

    def read_bytes(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Some of a tensor's bytes, as they lie in the file; raises as `read`."""
        return read_span(self.path, self.entries[name].begin + begin, end - begin, name)


def read_span(path: Path, begin: int, size_bytes: int, name: str) -> torch.Tensor:
    """`size_bytes` of a file as uint8, in memory of their own. Raises `StorageError`, or `WeightsError` when the file ends
    before tensor `name` does."""
    raw = torch.empty(size_bytes, dtype=torch.uint8)
    view = raw.numpy().data
    with storage_errors(path), path.open("rb", buffering=0) as file:
        file.seek(begin)
        done = 0
        while done < size_bytes:
            count = file.readinto(view[done:])
            if not count:
                raise WeightsError(f"{path} ends inside {name}.", remedy="fetch or write it again")
            done += count
    return raw


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row by row, as the format has them; memory of its own only where its rows do not lie in order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return (flat.view(torch.uint8) if len(flat) else torch.empty(0, dtype=torch.uint8)).numpy().data


def _to_torch(entry: HeaderEntry, path: Path) -> TensorEntry:
    if entry.dtype not in DTYPES:
        raise WeightsError(f"{path} has {entry.name} of dtype {entry.dtype}, which is not known.")
    return TensorEntry(entry.name, DTYPES[entry.dtype], entry.shape, entry.begin)


class SafetensorsWriter:
    """Writes one file whose tensors are announced before the first is there; a context, to be left once all are written.

    The bytes are hashed on the way: two tensors are in memory at most, the one in hand and the one before. `entry` is the
    file's size and SHA-256 once the context has been left.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], *, metadata: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._specs = list(specs)
        self._next = 0
        self._file = HashedFile(path)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        begin = 0
        for spec in self._specs:
            end = begin + spec.size_bytes
            header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._head = struct.pack("<Q", len(text)) + text

    def __enter__(self) -> SafetensorsWriter:
        self._file.__enter__()
        self._file.write(self._head)
        return self

    def write(self, tensor: torch.Tensor) -> None:
        """Write the next of the announced tensors. Raises `WeightsError` when it is of another dtype or shape."""
        spec = self._specs[self._next]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise WeightsError(
                f"{spec.name} is {tensor.dtype} of {tuple(tensor.shape)}; {spec.dtype} of {spec.shape} was announced."
            )
        self._next += 1
        self._file.write(tensor_bytes(tensor))

    @property
    def entry(self) -> FileEntry | None:
        """Size and SHA-256, once the context has been left."""
        return self._file.entry

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.__exit__(kind, error, trace)
        if kind is None and self._next < len(self._specs):
            raise WeightsError(f"{self._specs[self._next].name} was announced for {self._path.name} and not written.")
