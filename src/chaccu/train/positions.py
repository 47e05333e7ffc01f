"""How far a model can tell positions apart, and `rope_scaling`, which stretches that.

Rotary positions (Su et al. 2021, arXiv:2104.09864) turn each pair of a head's channels by position x frequency. A model trained
on positions up to L reads longer texts when the frequencies are lowered: all alike (`linear`: Chen et al. 2023,
arXiv:2306.15595), the slow ones only (`yarn`: Peng et al. 2023, arXiv:2309.00071; `llama3`), or by the length at hand
(`dynamic`). It is written into the model's config, where transformers, GGUF converters and servers look for it.

Invariants: a length that the config does not reach stops the run; nothing is stretched twice. Ignored: positions that are no
parameter of a config (ALiBi), which have no limit here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from chaccu.errors import TrainError
from chaccu.train.recipe import Recipe, RopeScaling

# In Llama 3.1's own config.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Their frequencies follow the longest conversation of a row as soon as that passes the original length.
_BY_LENGTH = ("dynamic", "longrope")


def load_config(base: Path, recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    """The config of the model in `base`, stretched as the recipe says, and the values of its text model that differ for it.

    Raises `TrainError` when it cannot be read or its positions cannot be stretched.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise TrainError(f"cannot read the config of the model {str(base)!r}: {error}") from error
    return config, stretch_positions(config, recipe.rope_scaling) if recipe.rope_scaling else {}


def stretch_positions(config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """Put `scaling` into `config`; returns the values of its text model's config that changed.

    `max_position_embeddings` becomes the factor times what it was, except for `dynamic`, whose formula starts at the original.
    Layers with a sliding window keep their frequencies: they never look further than before. Raises `TrainError` for a model
    without rotary positions, or one that is stretched in another way already.
    """
    text = config.get_text_config()
    if not _rotary(text):
        raise TrainError(
            f"rope_scaling is for rotary positions, and {config.model_type} has none of that kind.",
            remedy="leave rope_scaling out, or use a base with rotary positions (LLaMA, Mistral, Qwen, Gemma)",
        )
    wanted = msgspec.to_builtins(scaling)
    wanted.pop("original_max_position_embeddings", None)
    there = _far_looking(text)
    if there.get("rope_type", "default") != "default":
        if all(there.get(key) == value for key, value in wanted.items()):
            return {}
        raise TrainError(
            f"the base's positions are stretched already: {there['rope_type']}, factor {there.get('factor')}.",
            remedy="leave rope_scaling out, or begin at a base whose config.json has no rope_scaling",
        )
    original = scaling.original_max_position_embeddings or int(text.max_position_embeddings)
    if scaling.rope_type in ("yarn", "llama3"):
        wanted = {**wanted, "original_max_position_embeddings": original}
    if scaling.rope_type == "llama3":
        wanted = {**_LLAMA3, **wanted}
    scaled = {**there, **wanted}
    parameters = text.rope_parameters
    changed: dict[str, Any] = {
        "rope_parameters": {**parameters, "full_attention": scaled} if "full_attention" in parameters else scaled
    }
    if scaling.rope_type != "dynamic":
        changed["max_position_embeddings"] = int(original * scaling.factor)
    if scaling.rope_type == "linear":
        changed["original_max_position_embeddings"] = original
    for key, value in changed.items():
        setattr(text, key, value)
    return changed


def check_lengths(config: Any, recipe: Recipe) -> None:
    """Raise `TrainError` when conversations of `sequence_len` tokens reach beyond the positions that `config` knows, or where
    frequencies would depend on a conversation's neighbours in its row."""
    text = config.get_text_config()
    trained = getattr(text, "max_position_embeddings", None)
    if not isinstance(trained, int):
        return
    length = recipe.sequence_len
    parameters = _far_looking(text)
    kind, factor = parameters.get("rope_type", "default"), float(parameters.get("factor") or 1.0)
    original = parameters.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if kind in _BY_LENGTH and length > (original or trained):
        raise TrainError(
            f"{kind} chooses its frequencies by the longest conversation of a row, which would change its neighbours; "
            f"sequence_len is {length:,}, and it does so from {original or trained:,} on.",
            remedy=f"sequence_len={original or trained}"
            + (", or rope_scaling.rope_type=yarn" if recipe.rope_scaling is not None else ""),
        )
    known = max(trained, int(original * factor)) if original else int(trained * factor)
    if length <= known:
        return
    if not _rotary(text):
        raise TrainError(
            f"sequence_len is {length:,}, and {config.model_type} has learnt {known:,} positions, which cannot be stretched.",
            remedy=f"sequence_len={known}, with chaccu data clean --max-tokens {known}, or a base with rotary positions",
        )
    if kind != "default" and recipe.rope_scaling is None:
        raise TrainError(
            f"sequence_len is {length:,}, and the base knows {known:,} positions, stretched already ({kind}).",
            remedy=f"sequence_len={known}, or a base that is not stretched, with rope_scaling",
        )
    start = original or (trained if kind == "default" else known / factor)
    needed = math.ceil(length / start)
    reached = f" with rope_scaling.factor {factor:g}" if recipe.rope_scaling is not None else ""
    raise TrainError(
        f"sequence_len is {length:,}, and the base knows {known:,} positions{reached}.",
        remedy=f"rope_scaling: {{rope_type: linear, factor: {needed:.1f}}}, or sequence_len={known}",
    )


def _rotary(text: Any) -> bool:
    return bool(getattr(text, "rope_parameters", None))


def _far_looking(text: Any) -> dict[str, Any]:
    """The rotary parameters of the layers that see a whole conversation; of all layers where they do not differ."""
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    return dict(parameters.get("full_attention") or {}) if "full_attention" in parameters else dict(parameters)
