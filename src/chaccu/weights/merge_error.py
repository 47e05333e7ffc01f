"""How far the weights that a merge writes lie from those that it means: the rounding of what they are written in.

For a weight W of the base and its update ΔW, with W' as written, the error is ‖W' − (W + ΔW)‖, by the Frobenius norm, as a
share of ‖ΔW‖ and of ‖W + ΔW‖. A share of the update near 1 says that rounding has undone what the adapter learned.
"""

from __future__ import annotations

import math

import msgspec
import torch

from chaccu.errors import WeightsError

# From here on the rounding is as large as half of what was learned.
LARGE_SHARE = 0.5


class Shares(msgspec.Struct, frozen=True):
    """An error as a share of the update (None where the adapter changes nothing) and of the weights."""

    of_update: float | None
    of_weights: float


class MergeError(msgspec.Struct, frozen=True):
    """Over all changed weights together, and of the one whose update suffers most."""

    overall: Shares
    worst: Shares
    worst_weight: str

    def describe(self) -> str:
        """For people, in one line."""
        text = f"rounding error: {_describe(self.overall)}; at worst {_describe(self.worst)} in {self.worst_weight}"
        if (self.overall.of_update or 0.0) >= LARGE_SHARE:
            text += "\nmuch of what the adapter learned is lost in rounding: write the merged weights in more bits"
        return text


def _describe(shares: Shares) -> str:
    update = "no update" if shares.of_update is None else f"{shares.of_update:.2%} of the update"
    return f"{update} and {shares.of_weights:.3%} of the weights"


class _Sums:
    """Squares of the norms, in float64 over pieces that are summed in float32."""

    def __init__(self) -> None:
        self.error = self.update = self.weights = 0.0

    def add(self, other: _Sums) -> None:
        self.error += other.error
        self.update += other.update
        self.weights += other.weights

    def shares(self) -> Shares:
        return Shares(
            of_update=math.sqrt(self.error / self.update) if self.update else None,
            of_weights=math.sqrt(self.error / self.weights) if self.weights else 0.0,
        )


class ErrorMeter:
    """Takes what was written piece by piece. `result` is the error over all of it."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def add(self, weight: str, base: torch.Tensor, meant: torch.Tensor, written: torch.Tensor) -> None:
        """Rows of one weight, in float32: the base's, what they are meant to be and what they are as written.

        Raises `WeightsError` when a value that was written is not finite: it was too large for its type.
        """
        sums = self._sums.setdefault(weight, _Sums())
        error = _square(written - meant)
        if not math.isfinite(error):
            raise WeightsError(
                f"{weight}, merged, has values of up to {float(meant.abs().max()):.3g}, too large for what it is written in.",
                remedy="use a base in bfloat16 or float32: chaccu weights convert",
            )
        sums.error += error
        sums.update += _square(meant - base)
        sums.weights += _square(meant)

    def result(self) -> MergeError:
        """Of everything taken so far; at least one weight."""
        overall = _Sums()
        for sums in self._sums.values():
            overall.add(sums)
        shares = {weight: sums.shares() for weight, sums in self._sums.items()}
        worst = max(shares, key=lambda weight: (shares[weight].of_update or 0.0, shares[weight].of_weights))
        return MergeError(overall.shares(), shares[worst], worst)


def _square(values: torch.Tensor) -> float:
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))
