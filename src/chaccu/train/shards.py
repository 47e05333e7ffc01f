"""Tensors that lie in shards over the processes, and plain ones, by the same names.

Sharded parameters and their gradients are `DTensor`s (torch.distributed.tensor), cut along their first dimension; what is
computed element by element needs this process's shard alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of `tensor` is here: the memory of its shard, which may be empty, or itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` put together from all processes, on each. All have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over all elements of all `tensors`, a float32 scalar on the device. All processes have to call it."""
    norms = torch._foreach_norm([local(tensor) for tensor in tensors])
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([one.float() for one in norms]))
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return norm
    square = norm.square()
    torch.distributed.all_reduce(square)
    return square.sqrt()
