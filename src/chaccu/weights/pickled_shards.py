"""PyTorch's pickled weights, read without loading pickles: which tensors a file holds, and one of them at a time.

Both layouts of `torch.save` are read: the zip archive (`data.pkl` beside one stored member a storage) and the older stream
(pickles, then the storages one after another). Invariants: the pickle may name what describes a tensor and nothing else, and
what it names are this module's own descriptions, so that nothing of the file is run and no data is read before it is asked
for; a description that reaches beyond its storage, or a storage beyond the file, is refused when the file is opened.

Ignored: whatever is no plain tensor (quantised and sparse tensors, optimizer states, nested dictionaries). It is refused by
name.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import msgspec
import torch

from chaccu.artifact import storage_errors
from chaccu.errors import WeightsError
from chaccu.weights.checkpoint import Checkpoint, read_index
from chaccu.weights.safetensors_file import DTYPE_NAMES, TensorSpec, read_span

PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
# The two numbers that begin torch.save's older layout.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_SHARD = re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin")
_LONGEST_PICKLE = 100_000_000
_ARCHIVE_MARK = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# What a pickle raises that is cut off, or was made to do harm.
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError, struct.error),
    *(ValueError, TypeError, AttributeError, LookupError, OverflowError, MemoryError),
)
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


class PickledTensor(TensorSpec, frozen=True):
    """A tensor of a file; its first element begins at `begin`, counted in bytes from the file's start; `stride` in elements."""

    begin: int
    stride: tuple[int, ...]

    @property
    def reach(self) -> int:
        """Elements from its first to its last."""
        return _reach(self.shape, self.stride)


class PickledFile:
    """A file of `torch.save` with tensors by name, opened for reading.

    Raises `WeightsError` when it is none, is cut off, or imports anything that a tensor does not need; `StorageError` when it
    cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with storage_errors(path), path.open("rb") as file:
                is_archive = file.read(4) == _ARCHIVE_MARK
                file.seek(0)
                views = _read_archive(path, file) if is_archive else _read_stream(path, file)
        except _DAMAGE as error:
            raise WeightsError(f"{path} is cut off or damaged ({error}).", remedy="fetch it again") from error
        self.entries = {name: _place(path, name, view) for name, view in views.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own. Raises `StorageError`, or `WeightsError` when the file shrank since it was
        opened."""
        entry = self.entries[name]
        flat = read_span(self.path, entry.begin, entry.reach * entry.dtype.itemsize, name).view(entry.dtype)
        return flat.as_strided(entry.shape, entry.stride).contiguous()

    def read_bytes(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Some of a tensor's bytes, row by row; raises as `read`."""
        entry = self.entries[name]
        if entry.stride == _stride_in_order(entry.shape):
            return read_span(self.path, entry.begin + begin, end - begin, name)
        return self.read(name).reshape(-1).view(torch.uint8)[begin:end]

    def find_twins(self) -> list[list[str]]:
        """Names that are one and the same tensor, the first of them first."""
        groups: dict[Any, list[str]] = {}
        for name, entry in self.entries.items():
            if entry.size_bytes:
                groups.setdefault((entry.begin, entry.dtype, entry.shape, entry.stride), []).append(name)
        return [names for names in groups.values() if len(names) > 1]


def list_pickled_shards(folder: Path, places: Mapping[str, Any] | None) -> list[Path]:
    """The files of a folder's pickled weights: those that its index names (`places`: file by tensor name), else the one file,
    else all that are numbered; none where there are none.

    Raises `WeightsError` when one of them is not there.
    """
    if places is not None:
        names = sorted({str(name) for name in places.values()})
    elif (folder / PICKLED_NAME).is_file():
        names = [PICKLED_NAME]
    else:
        numbered = sorted(path.name for path in folder.glob("pytorch_model-*.bin") if _SHARD.fullmatch(path.name))
        counts = {int(match[2]) for match in map(_SHARD.fullmatch, numbered) if match}
        if len(counts) > 1:
            raise WeightsError(
                f"{folder} holds the pickled shards of several models: {', '.join(numbered)}.", remedy="keep one's"
            )
        names = [f"pytorch_model-{at:05}-of-{count:05}.bin" for count in counts for at in range(1, count + 1)]
    paths = [folder / name for name in names]
    missing = next((path for path in paths if path.parent != folder or not path.is_file()), None)
    if missing is not None:
        raise WeightsError(f"{missing} is a part of the weights and is not there.", remedy="fetch it again")
    return paths


def open_pickled(folder: Path) -> Checkpoint:
    """A folder's pickled weights as one mapping. Raises `WeightsError` when there are none, or one is damaged or refused."""
    shards = list_pickled_shards(folder, read_index(folder, PICKLED_INDEX_NAME))
    if not shards:
        raise WeightsError(
            f"{folder} holds no {PICKLED_NAME} and no shards of one.", remedy="name a folder with a model's weights"
        )
    return Checkpoint(folder, files=[PickledFile(path) for path in shards])


class _Storage(msgspec.Struct, frozen=True):
    """Elements in the file: `size` of `dtype`, or bytes where `dtype` is None. `begin` is known once the file's table is
    read."""

    key: str
    dtype: torch.dtype | None
    size: int
    begin: int = -1

    @property
    def size_bytes(self) -> int:
        return self.size * (self.dtype.itemsize if self.dtype else 1)


class _StorageType(msgspec.Struct, frozen=True):
    dtype: torch.dtype | None


class _View(msgspec.Struct, frozen=True):
    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Tensors(dict[str, Any]):
    """What a state dictionary becomes; as `OrderedDict` it may carry attributes, which are ignored."""


class _Allowed(msgspec.Struct, frozen=True):
    """What a pickle gets in place of a function that it names. Frozen: a pickle can set attributes on whatever it was given."""

    build: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.build(*arguments)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> _View:
    if not isinstance(storage, _Storage) or storage.dtype is None:
        raise ValueError("a tensor without a storage")
    return _View(storage, storage.dtype, offset, tuple(shape), tuple(stride))


def _rebuild_tensor_of_bytes(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> _View:
    if not isinstance(storage, _Storage) or not isinstance(dtype, _StorageType) or dtype.dtype is None:
        raise ValueError("a tensor without a storage or a dtype")
    return _View(storage, dtype.dtype, offset, tuple(shape), tuple(stride))


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Allowed(_Tensors),
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Allowed(_rebuild_tensor_of_bytes),
    ("torch._utils", "_rebuild_parameter"): _Allowed(lambda data, requires_grad, hooks: data),
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    **{
        (module, f"{name}Storage"): _StorageType(dtype)
        for module in ("torch", "torch.cuda")
        for name, dtype in _STORAGES.items()
    },
    **{("torch", str(dtype).removeprefix("torch.")): _StorageType(dtype) for dtype in DTYPE_NAMES},
}


class _Unpickler(pickle.Unpickler):
    """Reads descriptions of tensors; refuses a pickle that names anything else. `storages` collects those that it refers to."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = _GLOBALS.get((module, name))
        if found is None:
            raise WeightsError(
                f"{self._path} is a pickle that imports {module}.{name}, which no tensor needs; nothing of it was run.",
                remedy="take the model from another place, in safetensors",
            )
        return found

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, _, size, *view = reference
        if kind != "storage" or not isinstance(storage_type, _StorageType) or any(view) or not _is_size(size):
            raise ValueError(f"an unknown reference of kind {kind!r}")
        storage = _Storage(str(key), storage_type.dtype, size)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {key} is of two kinds")
        return storage


def _read_archive(path: Path, file: IO[bytes]) -> dict[str, _View]:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickled = [name for name in members if name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise WeightsError(
                f"{path} is an archive without the one data.pkl that torch.save writes.", remedy="fetch it again"
            )
        root = pickled[0].removesuffix("data.pkl")
        if members[pickled[0]].file_size > _LONGEST_PICKLE:
            raise WeightsError(f"{path} has a data.pkl of {members[pickled[0]].file_size:,} bytes; weights need far less.")
        order = members.get(f"{root}byteorder")
        if order is not None and archive.open(order).read(16) != b"little":
            raise WeightsError(f"{path} was written on a big-endian machine.", remedy="save it again on another")
        unpickler = _Unpickler(BytesIO(archive.read(pickled[0])), path)
        views = _check_tensors(path, unpickler.load())
    begins = {key: _find_member(file, members[f"{root}data/{key}"], storage) for key, storage in unpickler.storages.items()}
    return _with_begins(views, begins)


def _find_member(file: IO[bytes], member: zipfile.ZipInfo, storage: _Storage) -> int:
    """Where a stored member's bytes begin. The central directory does not say: the local header's length does."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"{member.filename} is compressed")
    if member.file_size < storage.size_bytes:
        raise ValueError(f"{member.filename} has {member.file_size:,} bytes of {storage.size_bytes:,}")
    file.seek(member.header_offset)
    mark, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if mark != _ARCHIVE_MARK:
        raise ValueError(f"{member.filename} is not where the archive says")
    return int(member.header_offset + _LOCAL_HEADER.size + name_length + extra_length)


def _read_stream(path: Path, file: IO[bytes]) -> dict[str, _View]:
    file.seek(0)
    if file.read(24).startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is Git LFS's pointer to the file, not the file.", remedy="fetch it: git lfs pull")
    file.seek(0)
    if file.read(1) != b"\x80":
        raise WeightsError(f"{path} is no file of torch.save.", remedy="fetch it again")
    file.seek(0)
    if (_Unpickler(file, path).load(), _Unpickler(file, path).load()) != (_MAGIC, _PROTOCOL):
        raise WeightsError(f"{path} is a pickle, but none of torch.save.", remedy="take the model from another place")
    machine = _Unpickler(file, path).load()
    if not machine["little_endian"]:
        raise WeightsError(f"{path} was written on a big-endian machine.", remedy="save it again on another")
    unpickler = _Unpickler(file, path)
    views = _check_tensors(path, unpickler.load())
    begins: dict[str, int] = {}
    for key in _Unpickler(file, path).load():
        storage = unpickler.storages[str(key)]
        (size,) = struct.unpack("<q", file.read(8))
        if size != storage.size:
            raise ValueError(f"storage {key} has {size} elements of {storage.size}")
        begins[storage.key] = file.tell()
        file.seek(storage.size_bytes, 1)
    return _with_begins(views, begins)


def _check_tensors(path: Path, found: Any) -> dict[str, _View]:
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds {_kind_of(found)}, not tensors by name.")
    odd = next((name for name, value in found.items() if not isinstance(name, str) or not isinstance(value, _View)), None)
    if odd is not None:
        raise WeightsError(
            f"{path} holds {odd!r}, which is {_kind_of(found[odd])} and no tensor.",
            remedy="save the model's state_dict() alone, or take the model from another place",
        )
    return found


def _kind_of(value: Any) -> str:
    return "a tensor" if isinstance(value, _View) else f"of type {'dict' if isinstance(value, dict) else type(value).__name__}"


def _with_begins(views: dict[str, _View], begins: dict[str, int]) -> dict[str, _View]:
    replace = msgspec.structs.replace
    return {name: replace(view, storage=replace(view.storage, begin=begins[view.storage.key])) for name, view in views.items()}


def _place(path: Path, name: str, view: _View) -> PickledTensor:
    sides = (*view.shape, *view.stride, view.offset)
    itemsize = view.dtype.itemsize
    fits = all(map(_is_size, sides)) and len(view.shape) == len(view.stride)
    needed = (view.offset + _reach(view.shape, view.stride)) * itemsize if fits else 0
    # An expanded view stands for more elements than are there, and could stand for more than the memory holds.
    if not fits or needed > view.storage.size_bytes or math.prod(view.shape) * itemsize > view.storage.size_bytes:
        raise WeightsError(f"{path} is damaged: {name} reaches beyond its storage.", remedy="fetch it again")
    begin = view.storage.begin + view.offset * itemsize
    if view.storage.begin + view.storage.size_bytes > path.stat().st_size:
        raise WeightsError(f"{path} is cut off inside {name}.", remedy="fetch it again")
    return PickledTensor(name, view.dtype, view.shape, begin, view.stride)


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))


def _stride_in_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of a tensor whose rows lie in order."""
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0
