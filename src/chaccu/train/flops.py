"""Model FLOPs of a step and the peak of the chip: what the share of the peak (MFU, Chowdhery et al. 2022, arXiv:2204.02311,
appendix B) is made of.

A token costs 6 FLOPs for each weight of a matrix that it passes through: 2 in the forward pass, 2 for the gradient of the
matrix's input, 2 for that of the weight. A frozen matrix (LoRA, QLoRA) has no gradient of the weight: 4. To attend costs
12·width a layer for each token attended to: two products of 2 forward, twice that backward; width is heads × width of a head.

Invariants: only what the model needs counts, so recomputed activations and padding earn nothing; an embedding is looked up, not
multiplied, and counts only as the output projection, which counts for every token though the loss takes it for trained ones.
Of a mixture's experts those count that one token is sent to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
import torch

# Dense bf16 (fp16 on chips without) with sums in float32, TFLOP/s, from the makers' data sheets; the first that matches counts.
_PEAKS_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500),
    (r"B200", 2250),
    (r"GH200|H200(?! NVL)", 989),
    (r"H100 PCIe", 756),
    (r"H(100|200) NVL", 835),
    (r"H100|H800(?! PCIe)", 989),
    (r"H20", 148),
    (r"A[18]00", 312),
    (r"A40", 150),
    (r"A30", 165),
    (r"A10G", 70),
    (r"A10", 125),
    (r"L40S", 362),
    (r"L40", 181),
    (r"L4", 121),
    (r"T4", 65),
    (r"V100-PCIE", 112),
    (r"V100", 125),
    (r"RTX 5090", 209),
    (r"RTX 4090", 165),
    (r"RTX 3090", 71),
    (r"MI300X", 1307),
)
# Cut-down relatives that bear the name of a bigger chip.
_RELATIVES = re.compile(r"Laptop|Max-Q|Mobile|RTX \d+ (Ti|D|SUPER)\b|\bMIG\b")


def find_peak_flops(chip: str) -> float | None:
    """Dense 16-bit FLOP/s of the chip that `torch.cuda.get_device_name` calls so; None when it is not in the table."""
    if _RELATIVES.search(chip):
        return None
    peaks = (peak for name, peak in _PEAKS_TFLOPS if re.search(rf"(?<![A-Za-z0-9])(?:{name})(?![A-Za-z0-9])", chip))
    found = next(peaks, None)
    return None if found is None else found * 1e12


def find_device_peak(device: torch.device) -> float | None:
    """As `find_peak_flops`, for a device; None for a CPU."""
    return find_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class ModelFlops(msgspec.Struct, frozen=True):
    """`matrices`: FLOPs a token in matrices, forward and backward. `width`: heads × width of a head. `windows`: for each layer
    that attends, how many tokens a token sees at most (None = all before it)."""

    matrices: int
    width: int
    windows: tuple[int | None, ...]

    def count(self, lengths: Iterable[int]) -> float:
        """FLOPs of a step over conversations of these lengths."""
        lengths = list(lengths)
        attended = sum(self.windows.count(window) * _sum_attended(lengths, window) for window in set(self.windows))
        return self.matrices * sum(lengths) + 12 * self.width * attended


def _sum_attended(lengths: list[int], window: int | None) -> float:
    """Tokens attended to, summed over the tokens of all conversations: half its conversation for each, less beyond a window."""
    total = 0.0
    for length in lengths:
        seen = length if window is None else min(length, window)
        total += seen * seen / 2 + (length - seen) * seen
    return total


def count_model_flops(causal: Any) -> ModelFlops:
    """What a token costs in a transformers causal model as it is: adapters in it, some of its weights frozen."""
    config = causal.config.get_text_config()
    parts = [causal.get_decoder(), causal.get_output_embeddings()]
    weights: dict[int, float] = {}
    for part in parts:
        for name, module in part.named_modules():
            if not isinstance(module, (torch.nn.Embedding, torch.nn.ParameterDict)):
                share = _experts_share(config) if "experts" in name.split(".") else 1.0
                weights.update((id(weight), share * cost) for weight, cost in _matrices(module))
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelFlops(round(sum(weights.values())), heads * head_width, _windows(config))


def _matrices(module: Any) -> Iterable[tuple[torch.Tensor, float]]:
    """A module's own matrices (of experts: stacks of them) with their FLOPs a token."""
    for weight in module.parameters(recurse=False):
        size = weight.numel()
        if hasattr(module, "in_features") and weight is getattr(module, "weight", None):
            # A quantised weight is stored packed: its size is not its shape's.
            size = int(module.in_features) * int(module.out_features)
        elif weight.ndim < 2:
            continue
        yield weight, (6 if weight.requires_grad else 4) * size


def _experts_share(config: Any) -> float:
    """Of a mixture's experts (Mixtral, Qwen-MoE, DeepSeek), the share that one token is sent to."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(config, name, None))), None)
    return chosen / experts if chosen and experts else 1.0


def _windows(config: Any) -> tuple[int | None, ...]:
    """Each attending layer's window: `layer_types` says which slide; without it all do where the config has a window in use."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window if getattr(config, "use_sliding_window", True) else None,) * int(config.num_hidden_layers)
    return tuple(window if kind == "sliding_attention" else None for kind in types if "linear" not in kind and kind != "conv")
