"""Rotary positions between a Hugging Face config and GGUF: metadata (`*.rope.*`, the GGUF specification), and for Llama 3.1's
way of stretching the tensor of factors by which llama.cpp divides the frequencies.

Invariant: what one side cannot say of the other is refused by name. It ignores the positions of layers that see a window only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from chaccu.errors import WeightsError
from chaccu.weights.gguf_file import GgufFile, PairValue, pack_pairs

if TYPE_CHECKING:
    import numpy as np

FACTORS_NAME = "rope_freqs.weight"
_ORIGINAL = "original_max_position_embeddings"
# Of Llama 3.1, whose GGUF files do not say it.
_LLAMA3_ORIGINAL, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
# What llama.cpp computes YaRN with (Peng et al. 2023, arXiv:2309.00071), and transformers where nothing else is said.
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}


def read_rope(file: GgufFile) -> dict[str, Any]:
    """transformers' parameters of how a GGUF file stretches positions. Raises `WeightsError` for a way that is not known."""
    prefix = f"{file.architecture}.rope.scaling"
    kind, factor = str(file.get(f"{prefix}.type", "none")), float(file.get(f"{prefix}.factor", 1.0))
    if FACTORS_NAME in file.tensors:
        return _read_factors(file)
    if kind == "none" or factor in (0.0, 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, _ORIGINAL: file.require(f"{prefix}.original_context_length")}
    raise WeightsError(f"{file.path} stretches positions by {kind!r}.", remedy="linear, yarn and llama3 are read")


def rope_pairs(prefix: str, rope: dict[str, Any]) -> dict[str, PairValue]:
    """The metadata of architecture `prefix` for transformers' parameters; `frequency_factors` has what they leave out.

    Raises `WeightsError` for a way of stretching that llama.cpp does not know, or knows with other constants alone.
    """
    kind = str(rope.get("rope_type", "default"))
    original = f"{prefix}.rope.scaling.original_context_length"
    if kind == "default":
        return {}
    if kind == "llama3":
        return {original: int(rope[_ORIGINAL])}
    if kind not in ("linear", "yarn"):
        raise WeightsError(f"the metadata of GGUF does not know the rope_scaling {kind!r}.", remedy=_REMEDY)
    factor = float(rope["factor"])
    pairs: dict[str, PairValue] = {f"{prefix}.rope.scaling.type": kind, f"{prefix}.rope.scaling.factor": factor}
    if kind == "yarn":
        _check_yarn(rope, factor)
        pairs[original] = int(rope[_ORIGINAL])
    return pairs


_REMEDY = "serve the model's Hugging Face folder; linear, yarn and llama3 are written"


def _check_yarn(rope: dict[str, Any], factor: float) -> None:
    if rope.get("attention_factor") is not None and not math.isclose(rope["attention_factor"], 0.1 * math.log(factor) + 1):
        raise WeightsError(f"llama.cpp has no attention_factor {rope['attention_factor']} of yarn.", remedy=_REMEDY)
    for key, default in _YARN_DEFAULTS.items():
        if rope.get(key) not in (None, default):
            raise WeightsError(f"llama.cpp computes yarn with {key} {default}, and the model has {rope[key]}.", remedy=_REMEDY)


def frequency_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray | None:
    """What llama.cpp divides each of the head_dim / 2 frequencies by, float32; None where the metadata says all.

    Llama 3.1's rule, as transformers has it (modeling_rope_utils, `llama3`): short waves as they are, long ones slower by the
    factor, and a smooth way from the one to the other.
    """
    import numpy as np

    if rope.get("rope_type") != "llama3":
        return None
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = float(rope[_ORIGINAL]) / _wavelengths(float(rope["rope_theta"]), head_dim)
    share = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


def _wavelengths(theta: float, head_dim: int) -> np.ndarray:
    """In positions."""
    import numpy as np

    return 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)


def _read_factors(file: GgufFile) -> dict[str, Any]:
    """The inverse of `frequency_factors`: of what belongs together only the ratios are in a file, so that the original context
    is Llama 3.1's where none is named."""
    import numpy as np

    factors = file.dequantized(FACTORS_NAME).astype(np.float64)
    if np.all(factors == 1):
        return {"rope_type": "default"}
    prefix = file.architecture
    original = int(file.get(f"{prefix}.rope.scaling.original_context_length", _LLAMA3_ORIGINAL))
    theta = float(file.get(f"{prefix}.rope.freq_base", 10000.0))
    largest = float(factors.max())
    inside = (factors > 1.0001) & (factors < largest * 0.9999)
    bounds = [(_LLAMA3_LOW, _LLAMA3_HIGH)]
    if np.count_nonzero(inside) >= 2:
        waves = original / _wavelengths(theta, 2 * len(factors))[inside]
        slope, offset = np.polyfit(waves, (1 / factors[inside] - 1 / largest) / (1 - 1 / largest), 1)
        bounds.append((round(float(-offset / slope), 4), round(float((1 - offset) / slope), 4)))
    for low, high in bounds:
        rope = {"rope_type": "llama3", "factor": largest, "low_freq_factor": low, "high_freq_factor": high, _ORIGINAL: original}
        found = frequency_factors({**rope, "rope_theta": theta}, 2 * len(factors))
        if found is not None and np.allclose(found, factors, rtol=1e-4):
            return rope
    raise WeightsError(
        f"{file.path} stretches positions by factors ({FACTORS_NAME}) that are not Llama 3.1's.",
        remedy="use the model's Hugging Face folder",
    )


def stretch_pairs(file: GgufFile, changes: dict[str, Any]) -> tuple[int, bytes]:
    """The file's metadata with `changes` of the model's config in it (what training with `rope_scaling` records).

    Raises `WeightsError` for a way of stretching that GGUF's metadata cannot say.
    """
    if not changes:
        return file.pairs_without()
    rope = changes["rope_parameters"]
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] not in ("linear", "yarn"):
        raise WeightsError(
            f"the adapter was trained with rope_scaling {rope['rope_type']}, which the metadata of GGUF does not know.",
            remedy="merge it into the base's Hugging Face folder: leave --gguf out",
        )
    pairs = {
        f"{file.architecture}.context_length": int(changes["max_position_embeddings"]),
        **rope_pairs(file.architecture, rope),
    }
    (count, kept), (added, packed) = file.pairs_without(*pairs), pack_pairs(pairs)
    return count + added, kept + packed
