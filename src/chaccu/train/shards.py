"""Tensors that lie in shards over the processes, and plain ones, by the same names.

Sharded parameters and their gradients are `DTensor`s (torch.distributed.tensor), cut along their first dimension; what is
computed element by element needs this process's shard alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of `tensor` is here: the memory of its shard, which may be empty, or itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_divided(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies in shards over the processes."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` put together from all processes, on each. All have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor that is cut as `like` is and of which `part` is here; `part` where `like` is not cut. All processes have
    to call it."""
    if not isinstance(like, DTensor):
        return part
    shards = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return shards.full_tensor()


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What of a whole `tensor`, which all processes have, would be here if it were cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def norm_of_parts(parts: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over all elements of the tensors that are cut as those of `like` are and of which `parts` are here, a float32
    scalar on the device. All processes have to call it."""
    norms = torch._foreach_norm(list(parts), dtype=torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if not any(is_divided(tensor) for tensor in like):
        return norm
    square = norm.square()
    torch.distributed.all_reduce(square)
    return square.sqrt()
