"""Stretched rotary positions between a Hugging Face config and GGUF's metadata (`*.rope.scaling.*`, the GGUF specification).

Ignored: the tensor of frequencies that Llama 3.1's way of stretching takes in GGUF.
"""

from __future__ import annotations

from typing import Any

from chaccu.errors import WeightsError
from chaccu.weights.gguf_file import GgufFile, float_pair, integer_pair, string_pair


def read_rope(file: GgufFile) -> dict[str, Any]:
    """transformers' parameters of how a GGUF file stretches positions. Raises `WeightsError` for a way that is not known."""
    prefix = f"{file.architecture}.rope.scaling"
    kind, factor = str(file.get(f"{prefix}.type", "none")), float(file.get(f"{prefix}.factor", 1.0))
    if kind == "none" or factor in (0.0, 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = file.require(f"{prefix}.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise WeightsError(f"{file.path} stretches positions by {kind!r}.", remedy="linear and yarn are read")


def stretch_pairs(file: GgufFile, changes: dict[str, Any]) -> tuple[int, bytes]:
    """The file's metadata with `changes` of the model's config in it (what training with `rope_scaling` records).

    Raises `WeightsError` for a way of stretching that GGUF's metadata cannot say.
    """
    if not changes:
        return file.pairs_without()
    rope = changes["rope_parameters"]
    rope = rope.get("full_attention", rope)
    kind, factor = rope["rope_type"], float(rope["factor"])
    if kind not in ("linear", "yarn"):
        raise WeightsError(
            f"the adapter was trained with rope_scaling {kind}, which the metadata of GGUF does not know.",
            remedy="merge it into the base's Hugging Face folder: leave --gguf out",
        )
    prefix = file.architecture
    pairs = {
        f"{prefix}.context_length": integer_pair(f"{prefix}.context_length", int(changes["max_position_embeddings"])),
        f"{prefix}.rope.scaling.type": string_pair(f"{prefix}.rope.scaling.type", kind),
        f"{prefix}.rope.scaling.factor": float_pair(f"{prefix}.rope.scaling.factor", factor),
    }
    if kind == "yarn":
        key = f"{prefix}.rope.scaling.original_context_length"
        pairs[key] = integer_pair(key, int(rope["original_max_position_embeddings"]))
    count, kept = file.pairs_without(*pairs)
    return count + len(pairs), kept + b"".join(pairs.values())
