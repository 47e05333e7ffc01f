"""GGUF files: their metadata, read through a memory map, and their tensors, read and written one by one.

Layout after the public GGUF v3 specification (ggml, docs/gguf.md): header, key-value pairs, tensor table, padding, tensor data.
Its own reader, since the `gguf` package's takes a quarter of a minute for a vocabulary of 262,144 entries and this one half a
second; the
quantised block formats themselves are that package's (`gguf.quants`).

Invariants: reading and writing keep one tensor in memory at a time. Key-value pairs are carried over as
the bytes they were, so nothing a file says about its tokenizer is lost in a rewrite.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import WeightsError

if TYPE_CHECKING:
    import numpy as np

_MAGIC = b"GGUF"
_VERSION = 3
_DEFAULT_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOLEAN, _STRING, _ARRAY = 7, 8, 9
_ARRAY_ITEMS = {"<i4": 5, "<f4": 6}


# A value of the metadata; an array holds float32 or int32.
PairValue: TypeAlias = "str | bool | int | float | Sequence[str] | np.ndarray"


class ByteSink(Protocol):
    """What a file is written to."""

    def write(self, data: bytes | memoryview, /) -> Any: ...


class TensorEntry(msgspec.Struct, frozen=True):
    """One row of the tensor table. `shape` is in numpy's order (slowest axis first); `type_id` is ggml's; `offset` counts
    from the
    start of the data section; `size_bytes` is the packed size."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    size_bytes: int


class GgufFile:
    """A GGUF file opened for reading. Raises `WeightsError` when it is no GGUF file, of another version or cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path), path.open("rb") as file:
            size = path.stat().st_size
            if size < 24 or file.read(4) != _MAGIC:
                raise WeightsError(f"{path} is not a GGUF file ({size:,} bytes).", remedy="name a .gguf file")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_tables()
        except (struct.error, IndexError, UnicodeDecodeError, KeyError) as error:
            raise WeightsError(
                f"{path} is cut off or damaged in its header ({error}).", remedy="fetch the file again"
            ) from error
        end = max((self.data_start + entry.offset + entry.size_bytes for entry in self.tensors.values()), default=0)
        if end > size:
            raise WeightsError(
                f"{path} is cut off: its tensors need {end:,} bytes and it has {size:,}.", remedy="fetch the file again"
            )

    def _read_tables(self) -> None:
        version, tensor_count, pair_count = struct.unpack_from("<IQQ", self._map, 4)
        if version not in (2, _VERSION):
            raise WeightsError(f"{self.path} is GGUF version {version}; versions 2 and 3 are known.")
        position = self._pairs_start = 24
        self._pair_positions: dict[str, tuple[int, int]] = {}
        for _ in range(pair_count):
            key, position = self._read_string(position)
            (kind,) = struct.unpack_from("<I", self._map, position)
            self._pair_positions[key] = (kind, position + 4)
            position = self._skip(kind, position + 4)
        self._pairs_end = position
        self._pair_count = pair_count
        self.tensors: dict[str, TensorEntry] = {}
        for _ in range(tensor_count):
            entry, position = self._read_entry(position)
            self.tensors[entry.name] = entry
        self.alignment = int(self.get("general.alignment", _DEFAULT_ALIGNMENT))
        self.data_start = _align(position, self.alignment)

    def _read_entry(self, position: int) -> tuple[TensorEntry, int]:
        name, position = self._read_string(position)
        (rank,) = struct.unpack_from("<I", self._map, position)
        *dims, type_id, offset = struct.unpack_from(f"<{rank}QIQ", self._map, position + 4)
        shape = tuple(reversed(dims))
        return TensorEntry(name, shape, type_id, offset, packed_bytes(shape, type_id)), position + 4 + 8 * rank + 12

    def _read_string(self, position: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._map, position)
        end = position + 8 + length
        return self._map[position + 8 : end].decode("utf-8"), end

    def _skip(self, kind: int, position: int) -> int:
        if kind == _STRING:
            return position + 8 + int(struct.unpack_from("<Q", self._map, position)[0])
        if kind != _ARRAY:
            return position + struct.calcsize("<" + _SCALARS[kind])
        item_kind, count = struct.unpack_from("<IQ", self._map, position)
        position += 12
        if item_kind in _SCALARS:
            return position + int(count) * struct.calcsize("<" + _SCALARS[item_kind])
        for _ in range(count):
            position = self._skip(item_kind, position)
        return position

    def _value(self, kind: int, position: int) -> Any:
        if kind == _STRING:
            return self._read_string(position)[0]
        if kind != _ARRAY:
            return struct.unpack_from("<" + _SCALARS[kind], self._map, position)[0]
        item_kind, count = struct.unpack_from("<IQ", self._map, position)
        position += 12
        if item_kind in _SCALARS:
            return list(struct.unpack_from(f"<{count}{_SCALARS[item_kind]}", self._map, position))
        items = []
        for _ in range(count):
            items.append(self._value(item_kind, position))
            position = self._skip(item_kind, position)
        return items

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Names of the key-value pairs in file order."""
        return tuple(self._pair_positions)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of one key-value pair (scalar, str or list), or `default`."""
        place = self._pair_positions.get(key)
        return default if place is None else self._value(*place)

    def require(self, key: str) -> Any:
        """As `get`; raises `WeightsError` when the key is absent."""
        if key not in self._pair_positions:
            raise WeightsError(
                f"{self.path} has no {key!r} in its metadata.", remedy="use a GGUF file made by a current converter"
            )
        return self.get(key)

    @property
    def architecture(self) -> str:
        """The model family, as GGUF names it."""
        return str(self.require("general.architecture"))

    def packed(self, name: str) -> np.ndarray:
        """The packed bytes of a tensor, in memory of their own."""
        from chaccu.weights.safetensors_file import read_span

        entry = self.tensors[name]
        return read_span(self.path, self.data_start + entry.offset, entry.size_bytes, name).numpy()

    def dequantized(self, name: str) -> np.ndarray:
        """A tensor as float32, in its logical shape."""
        import gguf

        entry = self.tensors[name]
        kind = gguf.GGMLQuantizationType(entry.type_id)
        rows = entry.shape[0] if len(entry.shape) > 1 else 1
        return gguf.quants.dequantize(self.packed(name).reshape(rows, -1), kind).reshape(entry.shape)

    def pairs_without(self, *dropped: str) -> tuple[int, bytes]:
        """Count and bytes of the key-value pairs but `dropped`, for `write_gguf`."""
        starts = [position - 4 - 8 - len(key.encode()) for key, (_, position) in self._pair_positions.items()]
        bounds = zip(self._pair_positions, starts, [*starts[1:], self._pairs_end], strict=True)
        kept = [self._map[start:end] for key, start, end in bounds if key not in dropped]
        return len(kept), b"".join(kept)

    def close(self) -> None:
        """Release the map of the metadata."""
        self._map.close()


def packed_bytes(shape: tuple[int, ...], type_id: int) -> int:
    """Size in bytes of a tensor in ggml's packed form."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
    return math.prod(shape) // block * block_bytes


def string_pair(key: str, value: str) -> bytes:
    """One key-value pair of type string, as bytes."""
    return _string(key) + struct.pack("<I", _STRING) + _string(value)


def integer_pair(key: str, value: int) -> bytes:
    """One key-value pair of type uint32, as bytes."""
    return _string(key) + struct.pack("<II", 4, value)


def float_pair(key: str, value: float) -> bytes:
    """One key-value pair of type float32, as bytes."""
    return _string(key) + struct.pack("<If", 6, value)


def pack_pairs(values: Mapping[str, PairValue]) -> tuple[int, bytes]:
    """Count and bytes of key-value pairs, for `write_gguf`: int as uint32, float as float32, an array as its items' type."""
    return len(values), b"".join(_pack_pair(key, value) for key, value in values.items())


def _pack_pair(key: str, value: PairValue) -> bytes:
    import numpy as np

    if isinstance(value, bool):
        return _string(key) + struct.pack("<I?", _BOOLEAN, value)
    if isinstance(value, int):
        return integer_pair(key, value)
    if isinstance(value, float):
        return float_pair(key, value)
    if isinstance(value, str):
        return string_pair(key, value)
    if isinstance(value, np.ndarray):
        head = struct.pack("<IIQ", _ARRAY, _ARRAY_ITEMS[value.dtype.str], len(value))
        return _string(key) + head + value.tobytes()
    return _string(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))


def write_gguf(
    file: ByteSink,
    *,
    pairs: tuple[int, bytes],
    tensors: Iterable[tuple[str, tuple[int, ...], int]],
    packed: Callable[[str], np.ndarray],
    alignment: int = _DEFAULT_ALIGNMENT,
) -> Iterator[int]:
    """Write a GGUF file; yields the bytes written after each tensor (drive it to the end).

    `tensors`: (name, shape in numpy's order, ggml type id); `packed(name)` gives each one's bytes when its turn comes. Raises
    `WeightsError` when a tensor's bytes are not of the announced size.
    """
    import numpy as np

    table = list(tensors)
    sizes = [packed_bytes(shape, type_id) for _, shape, type_id in table]
    header = [_MAGIC, struct.pack("<IQQ", _VERSION, len(table), pairs[0]), pairs[1]]
    offset = 0
    for (name, shape, type_id), size in zip(table, sizes, strict=True):
        header.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_id, offset))
        offset = _align(offset + size, alignment)
    head = b"".join(header)
    file.write(head + bytes(_align(len(head), alignment) - len(head)))
    written = 0
    for (name, _, _), size in zip(table, sizes, strict=True):
        data = packed(name)
        if data.nbytes != size:
            raise WeightsError(f"tensor {name} has {data.nbytes:,} bytes; its type and shape announce {size:,}.")
        file.write(data.reshape(-1).view(np.uint8).data)
        del data  # before the next one is made
        if padding := _align(size, alignment) - size:
            file.write(bytes(padding))
        written += size
        yield written


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _align(position: int, alignment: int) -> int:
    return (position + alignment - 1) // alignment * alignment
