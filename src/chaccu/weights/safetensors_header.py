"""A safetensors file's header: which tensors lie where, read without torch and without the tensors.

The format is safetensors' own (github.com/huggingface/safetensors, README, "Format"): eight bytes of header length, a JSON
header, the tensors' bytes. Invariant: a file that is cut off, or whose header contradicts itself, is refused.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import WeightsError

# Bits of one element; the format's README and the library's Dtype have the names.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# The library's own limit; a longer header is no header.
_LONGEST_HEADER = 100_000_000


class HeaderEntry(msgspec.Struct, frozen=True):
    """A tensor of a file: `dtype` as the format names it; its bytes begin at `begin`, counted from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


def read_header(path: Path) -> tuple[dict[str, str], list[HeaderEntry]]:
    """The file's own words (`__metadata__`) and its tensors, in the order of their bytes.

    Raises `WeightsError` when it is no safetensors file, is cut off or damaged, `StorageError` when it cannot be read.
    """
    with storage_errors(path), path.open("rb") as file:
        size = path.stat().st_size
        head = file.read(8)
        (length,) = struct.unpack("<Q", head) if len(head) == 8 else (0,)
        if not 2 <= length <= _LONGEST_HEADER:
            raise WeightsError(f"{path} is no safetensors file ({size:,} bytes).", remedy="fetch or write it again")
        header = file.read(length)
    data_start = 8 + length
    if len(header) < length:
        raise WeightsError(
            f"{path} is cut off in its header: {size:,} bytes of at least {data_start:,}.", remedy="fetch or write it again"
        )
    try:
        values: dict[str, Any] = json.loads(header)
        metadata: dict[str, str] = values.pop("__metadata__", None) or {}
        entries = [_read_entry(name, value, data_start) for name, value in values.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} has a damaged header ({error}).", remedy="fetch or write it again") from error
    entries.sort(key=lambda entry: entry.begin)
    _check_places(path, entries, data_start, size)
    return metadata, entries


def _check_places(path: Path, entries: list[HeaderEntry], data_start: int, size: int) -> None:
    end = data_start
    for entry in entries:
        if entry.begin < end:
            raise WeightsError(f"{path} has a damaged header: {entry.name} lies inside another tensor.")
        end = entry.begin + entry.size_bytes
    if end > size:
        raise WeightsError(
            f"{path} is cut off: its tensors need {end:,} bytes and it has {size:,}.", remedy="fetch or write it again"
        )


def _read_entry(name: str, value: Mapping[str, Any], data_start: int) -> HeaderEntry:
    if value["dtype"] not in _BITS:
        raise ValueError(f"{name} is of dtype {value['dtype']}")
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(side) is int and side >= 0 for side in (*shape, begin, end)):
        raise ValueError(f"{name} has no sizes")
    needed = math.prod(shape) * _BITS[value["dtype"]] // 8
    if end - begin != needed:
        raise ValueError(f"{name} has {end - begin:,} bytes; its shape and dtype need {needed:,}")
    return HeaderEntry(name, value["dtype"], shape, data_start + begin, needed)
