"""What each architecture of GGUF means in Hugging Face's terms: tensor names, config and arrangement of values, both ways.

The names are those of the `gguf` package's tensor maps. Invariants: an architecture that is not in the table is refused by
name, and so is a model that computes anything that llama.cpp would compute otherwise. It ignores tokenizers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from chaccu.errors import WeightsError, did_you_mean
from chaccu.weights.gguf_file import GgufFile, PairValue
from chaccu.weights.gguf_rope import read_rope, rope_pairs

_LAYER, _BLOCK = re.compile(r"model\.layers\.(\d+)\."), re.compile(r"blk\.(\d+)\.")
_OUTER = ("model.embed_tokens", "model.norm", "lm_head")
_SUFFIXES = (".weight", ".bias")
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LLAMA_LAYER = (*_ATTENTION, *_FEED_FORWARD, "input_layernorm", "post_attention_layernorm")
_GEMMA2_LAYER = (*_LLAMA_LAYER, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


class ModelConfig:
    """A Hugging Face folder's config.json; a field that is null counts as absent. Raises `WeightsError` when it is none."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        try:
            self.values: dict[str, Any] = json.loads(self.path.read_bytes())
            self.model_type = str(self.values["model_type"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{self.path} cannot be read ({error}).", remedy="name a model's Hugging Face folder") from error

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def require(self, key: str) -> Any:
        """As `get`; raises `WeightsError` when the field is absent."""
        if self.values.get(key) is None:
            raise WeightsError(f"{self.path} has no {key}.", remedy="save the model with a current transformers")
        return self.values[key]

    def demand(self, key: str, *known: Any) -> None:
        """Raise `WeightsError` when the field is there and none of the `known` values."""
        if self.get(key, known[0]) not in known:
            raise WeightsError(
                f"{self.path} says {key} = {self.values[key]}; llama.cpp computes {self.model_type} with {known[0]}.",
                remedy="serve the Hugging Face folder itself",
            )

    @property
    def head_dim(self) -> int:
        return int(self.get("head_dim") or self.require("hidden_size") // self.require("num_attention_heads"))

    def rope(self, theta: float, layers: str = "full_attention") -> dict[str, Any]:
        """transformers' rope parameters of those `layers`, however old the config; `theta`: where none is said."""
        rope = self.get("rope_parameters") or self.get("rope_scaling") or {}
        rope = dict(rope.get(layers) or rope)
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        rope["rope_theta"] = float(rope.get("rope_theta") or self.get("rope_theta", theta))
        return rope


class Architecture(msgspec.Struct, frozen=True):
    """What one architecture of GGUF means in Hugging Face's terms.

    `model_types`: transformers' names for it; a file of it is imported as the first, as `class_name`. `layer`: the modules with
    weights inside a layer, those of `biased` perhaps with a bias. `norm_offset`: GGUF stores norm weights with 1 added.
    `permutes_qk`: GGUF interleaves the two rotary halves of the query and key rows. `windows`: llama.cpp knows which layers see
    a window only. `theta`: the base of rotary frequencies where a config says none.
    """

    name: str
    model_types: tuple[str, ...]
    class_name: str
    layer: tuple[str, ...]
    read_fields: Callable[[GgufFile, dict[str, Any]], dict[str, Any]]
    write_fields: Callable[[ModelConfig], dict[str, PairValue]]
    biased: tuple[str, ...] = ()
    norm_offset: bool = False
    permutes_qk: bool = False
    windows: bool = False
    theta: float = 10_000.0

    def gguf_name(self, name: str) -> str | None:
        """GGUF's name of a Hugging Face tensor; None when the architecture has none like it."""
        inside, outside = _tensor_names(self.name)
        layer = _LAYER.match(name)
        if layer is None:
            return outside.get(name)
        known = inside.get(name[layer.end() :])
        return f"blk.{layer[1]}.{known}" if known else None

    def hf_name(self, name: str) -> str | None:
        """The Hugging Face name of a GGUF tensor; None when it has none (derived tensors such as rope frequencies)."""
        inside, outside = _tensor_names(self.name)
        block = _BLOCK.match(name)
        if block is None:
            return next((hf for hf, known in outside.items() if known == name), None)
        known = next((hf for hf, known in inside.items() if known == name[block.end() :]), None)
        return f"model.layers.{block[1]}.{known}" if known else None

    def required_names(self, layers: int, *, tied: bool) -> list[str]:
        """Names that a Hugging Face folder of so many layers must have."""
        outer = [f"{module}.weight" for module in _OUTER if not (tied and module == "lm_head")]
        return outer + [f"model.layers.{at}.{module}.weight" for at in range(layers) for module in self.layer]

    def read_config(self, file: GgufFile) -> dict[str, Any]:
        """The contents of config.json for a GGUF file."""
        shared = _read_shared(file)
        rope = {**read_rope(file), "rope_theta": _short(file.get(f"{self.name}.rope.freq_base", self.theta))}
        biased = {key: True for key, tensor in _BIAS_FIELDS.items() if self.biased == _LLAMA_BIASED and tensor in file.tensors}
        fields = {
            "model_type": self.model_types[0],
            "architectures": [self.class_name],
            **shared,
            **biased,
            "rope_parameters": rope,
        }
        return {**fields, **self.read_fields(file, fields)}

    def write_config(self, config: ModelConfig) -> dict[str, PairValue]:
        """The metadata for a Hugging Face config. Raises `WeightsError` for a model that llama.cpp would compute otherwise."""
        config.demand("partial_rotary_factor", 1.0)
        if config.get("quantization_config"):
            raise WeightsError(f"{config.path} is of a quantised model.", remedy="name the folder that it was quantised from")
        pairs = _write_shared(self.name, config, windows=self.windows)
        rope = config.rope(self.theta)
        pairs[f"{self.name}.rope.freq_base"] = rope["rope_theta"]
        return {**pairs, **rope_pairs(self.name, rope), **self.write_fields(config)}


@lru_cache
def _tensor_names(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """GGUF's names by Hugging Face's: inside a layer and outside."""
    import gguf

    architecture = ARCHITECTURES[name]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], 1)
    inside: dict[str, str] = {}
    for module in architecture.layer:
        mapped = names[f"model.layers.0.{module}"].removeprefix("blk.0.")
        inside |= {module + suffix: mapped + suffix for suffix in _SUFFIXES[: 1 + (module in architecture.biased)]}
    # Gemma 2's map has no output of its own: it is always the embedding.
    outside = {f"{module}.weight": f"{names[module]}.weight" for module in _OUTER if module in names}
    return inside, outside


def find_architecture(file: GgufFile) -> Architecture:
    """The table entry for a file. Raises `WeightsError` when its architecture is not known."""
    name = file.architecture
    if name not in ARCHITECTURES:
        raise WeightsError(f"{file.path} is of architecture {name!r}.", remedy=did_you_mean(name, ARCHITECTURES))
    return ARCHITECTURES[name]


def find_architecture_of(config: ModelConfig) -> Architecture:
    """The table entry for a Hugging Face folder. Raises `WeightsError` when its model type is not known."""
    for architecture in ARCHITECTURES.values():
        if config.model_type in architecture.model_types:
            return architecture
    known = [name for architecture in ARCHITECTURES.values() for name in architecture.model_types]
    raise WeightsError(f"{config.path} is of model type {config.model_type!r}.", remedy=did_you_mean(config.model_type, known))


def head_count(name: str, heads: int, kv_heads: int) -> int:
    """How many heads the rows of a query or key projection (GGUF's name) are."""
    return kv_heads if ".attn_k." in name else heads


def _read_shared(file: GgufFile) -> dict[str, Any]:
    """The fields that every decoder has, out of `<architecture>.*` metadata."""
    prefix = file.architecture
    heads = file.require(f"{prefix}.attention.head_count")
    width = file.require(f"{prefix}.embedding_length")
    special = {
        key: file.get(f"tokenizer.ggml.{gguf}_token_id") for key, gguf in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": file.require(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": file.require(f"{prefix}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": file.get(f"{prefix}.attention.key_length", width // heads),
        "max_position_embeddings": file.require(f"{prefix}.context_length"),
        "rms_norm_eps": _short(file.require(f"{prefix}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{f"{key}_token_id": value for key, value in special.items() if value is not None},
    }


def _write_shared(prefix: str, config: ModelConfig, *, windows: bool) -> dict[str, PairValue]:
    heads = int(config.require("num_attention_heads"))
    return {
        "general.architecture": prefix,
        f"{prefix}.block_count": int(config.require("num_hidden_layers")),
        f"{prefix}.context_length": usable_context(config, windows=windows),
        f"{prefix}.embedding_length": int(config.require("hidden_size")),
        f"{prefix}.feed_forward_length": int(config.require("intermediate_size")),
        f"{prefix}.attention.head_count": heads,
        f"{prefix}.attention.head_count_kv": int(config.get("num_key_value_heads", heads)),
        f"{prefix}.attention.key_length": config.head_dim,
        f"{prefix}.attention.value_length": config.head_dim,
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config.require("rms_norm_eps")),
        f"{prefix}.rope.dimension_count": config.head_dim,
        f"{prefix}.vocab_size": int(config.require("vocab_size")),
    }


def usable_context(config: ModelConfig, *, windows: bool) -> int:
    """The longest context in tokens for which llama.cpp computes the same: where it does not know that a layer sees a window
    only, as far as the window."""
    context = int(config.require("max_position_embeddings"))
    window = config.get("sliding_window")
    # Mistral's always counts; Qwen's does where it is switched on, in the layers that are said or from one on.
    used = config.get("use_sliding_window", config.model_type == "mistral")
    used = used and "sliding_attention" in config.get("layer_types", ["sliding_attention"])
    return context if windows or window is None or not used else min(context, int(window))


def _short(value: float) -> float:
    """A float32 as the shortest decimal that means it."""
    import numpy as np

    return float(str(np.float32(value)))


def _read_nothing(file: GgufFile, fields: dict[str, Any]) -> dict[str, Any]:
    return {}


def _write_silu(config: ModelConfig) -> dict[str, PairValue]:
    config.demand("hidden_act", "silu")
    return {}


def _gemma_scale(layers: int, width: int, heads: int, head_dim: int, largest: int) -> int:
    """query_pre_attn_scalar as llama.cpp takes it: of the largest model, which it knows by its layers, the width of a head's
    share."""
    return width // heads if layers == largest else head_dim


def _write_gemma(config: ModelConfig, name: str, largest: int, layer_types: list[str]) -> dict[str, PairValue]:
    for key in ("hidden_activation", "hidden_act"):
        config.demand(key, "gelu_pytorch_tanh")
    config.demand("use_bidirectional_attention", False)
    width, heads = config.require("hidden_size"), config.require("num_attention_heads")
    config.demand("query_pre_attn_scalar", _gemma_scale(len(layer_types), width, heads, config.require("head_dim"), largest))
    config.demand("layer_types", layer_types)
    config.demand(
        "sliding_window_pattern", layer_types.index("full_attention") + 1 if "full_attention" in layer_types else None
    )
    return {f"{name}.attention.sliding_window": int(config.require("sliding_window"))}


def _window_layers(count: int, period: int) -> list[str]:
    """Every so many layers one attends to everything (Gemma 2 report, section 2; Gemma 3 report, section 2)."""
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(count)]


def _read_gemma(file: GgufFile, fields: dict[str, Any], largest: int, period: int) -> dict[str, Any]:
    layers, width, heads = (fields[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    return {
        "sliding_window": file.require(f"{file.architecture}.attention.sliding_window"),
        "query_pre_attn_scalar": _gemma_scale(layers, width, heads, fields["head_dim"], largest),
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": _window_layers(layers, period),
    }


def _read_gemma2(file: GgufFile, fields: dict[str, Any]) -> dict[str, Any]:
    caps = {key: file.get(f"gemma2.{key}", cap) for key, cap in _GEMMA2_CAPS.items()}
    return {**_read_gemma(file, fields, _GEMMA2_LARGEST, 2), **caps}


def _write_gemma2(config: ModelConfig) -> dict[str, PairValue]:
    layer_types = _window_layers(config.require("num_hidden_layers"), 2)
    caps = {f"gemma2.{key}": float(config.require(key)) for key in _GEMMA2_CAPS}
    return {**_write_gemma(config, "gemma2", _GEMMA2_LARGEST, layer_types), **caps}


def _read_gemma3(file: GgufFile, fields: dict[str, Any]) -> dict[str, Any]:
    near = {"rope_type": "default", "rope_theta": _GEMMA3_NEAR_THETA}
    rope = {"full_attention": fields["rope_parameters"], "sliding_attention": near}
    return {**_read_gemma(file, fields, _GEMMA3_LARGEST, 6), "rope_parameters": rope}


def _write_gemma3(config: ModelConfig) -> dict[str, PairValue]:
    for key in _GEMMA2_CAPS:
        config.demand(key, None)
    near = config.rope(_GEMMA3_NEAR_THETA, "sliding_attention") if config.get("rope_parameters") else {}
    theta = near.get("rope_theta", config.get("rope_local_base_freq", _GEMMA3_NEAR_THETA))
    if not math.isclose(theta, _GEMMA3_NEAR_THETA) or near.get("rope_type", "default") != "default":
        raise WeightsError(
            f"{config.path} has other rotary positions in the layers that see a window than llama.cpp: a base of {theta:,.0f}, "
            f"{near.get('rope_type', 'default')}; {_GEMMA3_NEAR_THETA:,.0f}, default are known.",
            remedy="serve the Hugging Face folder itself",
        )
    return _write_gemma(config, "gemma3", _GEMMA3_LARGEST, _window_layers(config.require("num_hidden_layers"), 6))


# Layers of the 27B models; the caps of Gemma 2; the base of rotary frequencies in Gemma 3's layers that see a window.
_GEMMA2_LARGEST, _GEMMA3_LARGEST = 46, 62
_GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3_NEAR_THETA = 10_000.0
_LLAMA_BIASED = (*_ATTENTION, *_FEED_FORWARD)
_BIAS_FIELDS = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "llama",
            ("llama", "mistral"),
            "LlamaForCausalLM",
            _LLAMA_LAYER,
            _read_nothing,
            _write_silu,
            biased=_LLAMA_BIASED,
            permutes_qk=True,
        ),
        Architecture("qwen2", ("qwen2",), "Qwen2ForCausalLM", _LLAMA_LAYER, _read_nothing, _write_silu, biased=_ATTENTION[:3]),
        Architecture("qwen3", ("qwen3",), "Qwen3ForCausalLM", (*_LLAMA_LAYER, *_HEAD_NORMS), _read_nothing, _write_silu),
        Architecture(
            "gemma2",
            ("gemma2",),
            "Gemma2ForCausalLM",
            _GEMMA2_LAYER,
            _read_gemma2,
            _write_gemma2,
            norm_offset=True,
            windows=True,
        ),
        Architecture(
            "gemma3",
            ("gemma3_text",),
            "Gemma3ForCausalLM",
            (*_GEMMA2_LAYER, *_HEAD_NORMS),
            _read_gemma3,
            _write_gemma3,
            norm_offset=True,
            windows=True,
            theta=1e6,
        ),
    )
}
