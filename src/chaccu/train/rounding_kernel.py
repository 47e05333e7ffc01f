"""What `rounding` does, as functions that Triton kernels call, and the hash that gives them their random bits.

Imported only where a GPU is, since Triton comes with PyTorch's GPU builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    constexpr = int
else:
    constexpr = tl.constexpr


@triton.jit
def mix_bits(bits):  # type: ignore[no-untyped-def]
    """A hash of 32 bits, each of which depends on all: a counter's are as good as random here, and cost six operations."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def share_of_top_half(bits):  # type: ignore[no-untyped-def]
    """The upper 16 bits as a number in (0, 1)."""
    return ((bits >> 16).to(tl.float32) + 0.5) / 65536.0


@triton.jit
def round_to_bfloat16(values, noise):  # type: ignore[no-untyped-def]
    """float32 values that bfloat16 holds, by random bits of 16 places."""
    bits = values.to(tl.uint32, bitcast=True) + noise
    rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    # The bits of what is not a number would run over into those of another one.
    return tl.where(values == values, rounded, values)


@triton.jit
def encode_rows(values, top: constexpr, random, FOURTH: constexpr):  # type: ignore[no-untyped-def]
    """Codes of the absolute values in each row, and the row's scale; of the fourth power, or of squares."""
    scales = tl.max(tl.abs(values), axis=1)
    share = tl.abs(values) * (1.0 / tl.maximum(scales, 1e-30))[:, None]
    root = tl.sqrt(share)
    if FOURTH:
        low = tl.minimum(tl.floor(top * tl.sqrt(root)), top - 1.0)
        value = low * low * low * low
        gap = (low + 1.0) * (low + 1.0) * (low + 1.0) * (low + 1.0) - value
        up = (share * (top * top * top * top) - value) / gap
    else:
        low = tl.minimum(tl.floor(top * root), top - 1.0)
        up = (share * (top * top) - low * low) / (2.0 * low + 1.0)
    return low + tl.where(random < up, 1.0, 0.0), scales
