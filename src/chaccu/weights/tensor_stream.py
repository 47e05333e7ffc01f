"""The same tensor of several checkpoints, read piece by piece side by side.

What is computed of two or more models element by element needs no whole tensor of any of them. Invariants: pieces come in order
and together make the tensor; each is hashed, and checked for values that are not finite where that is asked for, while it is
still in the processor's cache; the next pieces are read while the ones in hand are worked on. Reading and hashing let go of the
interpreter's lock, so that each checkpoint has a thread of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import numpy as np
import torch

from chaccu.weights.checkpoint import Checkpoint, require_finite
from chaccu.weights.safetensors_file import tensor_bytes

# 2 MB of 16-bit weights: a few of them fit in a cache, and a switch of threads is short beside one.
_PIECE = 1_048_576


class TensorReader:
    """One tensor of a checkpoint, to be read once from its first element to its last. `sha256`: of the bytes read so far.

    `finite`: refuse values that are not, see `require_finite`. `hashed`: false where nobody asks for `sha256`.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, *, finite: bool = True, hashed: bool = True) -> None:
        self._checkpoint = checkpoint
        self._entry = checkpoint.entries[name]
        self._finite = finite
        self._hash = hashlib.sha256() if hashed else None
        self.size = math.prod(self._entry.shape)

    @property
    def sha256(self) -> str:
        """In hex; of the whole tensor once it has been read."""
        assert self._hash is not None
        return self._hash.hexdigest()

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Elements `begin` to `end`, flat; as many as there are. Raises as `Checkpoint.read` and `require_finite`."""
        entry = self._entry
        places = [min(place, self.size) * entry.dtype.itemsize for place in (begin, end)]
        raw = self._checkpoint.read_bytes(entry.name, *places)
        if self._hash is not None:
            self._hash.update(raw.numpy().data)
        piece = raw.view(entry.dtype)
        if self._finite:
            require_finite(piece, entry.name, self._checkpoint.folder)
        return piece


def read_together(readers: Sequence[TensorReader], executor: Executor) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """(place of the first element, each reader's piece) up to the longest reader's end; a shorter one's last pieces are
    empty."""
    size = max(reader.size for reader in readers)
    starts = range(0, size, _PIECE)
    pending = [executor.submit(reader.read, 0, _PIECE) for reader in readers]
    for start in starts:
        pieces = [job.result() for job in pending]
        after = start + _PIECE
        if after < size:
            pending = [executor.submit(reader.read, after, after + _PIECE) for reader in readers]
        yield start, pieces


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns of a tensor's elements as unsigned integers of their width, flat; writing to them writes to a tensor
    whose rows lie in order."""
    return np.asarray(tensor_bytes(tensor)).view(f"u{tensor.dtype.itemsize}")
