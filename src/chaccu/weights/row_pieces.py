"""A weight's rows in pieces, so that what is reckoned in float32 takes little beside the weight itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

# The rows from `begin` to before `end`, in float32.
Rows = Callable[[int, int], torch.Tensor]
# The largest block that bitsandbytes packs by: every piece begins at a whole one.
_LARGEST_BLOCK = 4096
# 1 MB in float32, which stays in a processor's cache from one step to the next.
_VALUES_AT_ONCE = 1 << 18


def split_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(begin, end) of runs of rows with some 260,000 values, each of whole blocks but for the last."""
    rows, columns = shape
    unit = _LARGEST_BLOCK // math.gcd(_LARGEST_BLOCK, columns)
    step = max(unit, _VALUES_AT_ONCE // max(columns, 1) // unit * unit)
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)
