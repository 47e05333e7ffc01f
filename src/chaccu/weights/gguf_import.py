"""GGUF → Hugging Face folder: config, safetensors, tokenizer and manifest.

One small table per architecture says what its metadata and tensor names mean.

Invariants: tensors pass one at a time (peak memory: the largest tensor as float32, and the output dtype's copy of one
shard); an architecture that is not in the table is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.artifact import (
    Manifest,
    atomic_folder,
    library_versions,
    require_free_space,
    sha256_file,
    write_json,
    write_manifest,
)
from chaccu.conversation import TextTokenizer
from chaccu.errors import WeightsError, did_you_mean
from chaccu.weights.gguf_file import GgufFile
from chaccu.weights.gguf_rope import read_rope
from chaccu.weights.gguf_tokenizer import read_tokenizer

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int, int], None]
_BLOCK = re.compile(r"blk\.(\d+)\.")
_FLAT = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class Architecture(msgspec.Struct, frozen=True):
    """What one GGUF architecture means in Hugging Face terms.

    `blocks`: GGUF name inside a block → Hugging Face name inside a layer. `norm_offset`: GGUF stores norm weights with 1 added.
    `permutes_qk`: GGUF interleaves the two rotary halves of the query and key rows.
    """

    config: Callable[[GgufFile], dict[str, Any]]
    blocks: dict[str, str]
    norm_offset: bool = False
    permutes_qk: bool = False

    def hf_name(self, name: str) -> str | None:
        """The Hugging Face tensor name for a GGUF one; None when it has none (derived tensors such as rope frequencies)."""
        if name in _FLAT:
            return _FLAT[name]
        block = _BLOCK.match(name)
        inside = self.blocks.get(name[block.end() :].removesuffix(".weight")) if block else None
        return f"model.layers.{block[1]}.{inside}.weight" if block and inside else None


_LLAMA_BLOCKS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA3_BLOCKS = {
    **_LLAMA_BLOCKS,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _shared_config(file: GgufFile) -> dict[str, Any]:
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
        "rms_norm_eps": file.require(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{f"{key}_token_id": value for key, value in special.items() if value is not None},
    }


def _llama_config(file: GgufFile) -> dict[str, Any]:
    rope = {**read_rope(file), "rope_theta": file.get("llama.rope.freq_base", 10000.0)}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_shared_config(file), "rope_parameters": rope}


def _gemma3_config(file: GgufFile) -> dict[str, Any]:
    """Gemma 3 text model; every sixth layer attends to everything (Gemma 3 technical report, section 2)."""
    shared = _shared_config(file)
    layers = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(shared["num_hidden_layers"])]
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **shared,
        "sliding_window": file.require("gemma3.attention.sliding_window"),
        "query_pre_attn_scalar": shared["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": layers,
        "rope_parameters": {
            "full_attention": {**read_rope(file), "rope_theta": file.get("gemma3.rope.freq_base", 1_000_000.0)},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }


ARCHITECTURES: dict[str, Architecture] = {
    "gemma3": Architecture(_gemma3_config, _GEMMA3_BLOCKS, norm_offset=True),
    "llama": Architecture(_llama_config, _LLAMA_BLOCKS, permutes_qk=True),
}


def find_architecture(file: GgufFile) -> Architecture:
    """The table entry for a file. Raises `WeightsError` when its architecture is not known."""
    name = file.architecture
    if name not in ARCHITECTURES:
        raise WeightsError(f"{file.path} is of architecture {name!r}.", remedy=did_you_mean(name, ARCHITECTURES))
    return ARCHITECTURES[name]


def hf_tensor(file: GgufFile, name: str) -> np.ndarray:
    """A GGUF tensor as float32 in Hugging Face's arrangement."""
    architecture = find_architecture(file)
    values = file.dequantized(name)
    if architecture.norm_offset and name.endswith("norm.weight"):
        values = values - 1.0
    if architecture.permutes_qk and name.endswith((".attn_q.weight", ".attn_k.weight")):
        values = swap_rotary_halves(values, _head_count(file, name), inverse=True)
    return values


def gguf_values(file: GgufFile, name: str, values: np.ndarray) -> np.ndarray:
    """The inverse of `hf_tensor`: float32 values in Hugging Face's arrangement, as GGUF stores them."""
    architecture = find_architecture(file)
    if architecture.norm_offset and name.endswith("norm.weight"):
        return values + 1.0
    if architecture.permutes_qk and name.endswith((".attn_q.weight", ".attn_k.weight")):
        return swap_rotary_halves(values, _head_count(file, name), inverse=False)
    return values


def _head_count(file: GgufFile, name: str) -> int:
    heads = file.require(f"{file.architecture}.attention.head_count")
    return int(file.get(f"{file.architecture}.attention.head_count_kv", heads) if ".attn_k." in name else heads)


def swap_rotary_halves(values: np.ndarray, heads: int, *, inverse: bool) -> np.ndarray:
    """Rows of a query or key projection between Hugging Face's order (two halves) and GGUF's (interleaved pairs)."""
    import numpy as np

    half = values.shape[0] // heads // 2
    split = (heads, half, 2) if inverse else (heads, 2, half)
    return np.ascontiguousarray(values.reshape(*split, -1).swapaxes(1, 2).reshape(values.shape))


def import_gguf(
    source: Path, out: Path, *, chat_format: str, dtype: str = "bfloat16", progress: Progress | None = None
) -> Manifest:
    """Write `source` as a Hugging Face folder at `out` (config, one safetensors file, tokenizer, manifest), atomically.

    `progress(done, total)` counts tensors. Raises `WeightsError` for an unknown architecture or a damaged file,
    `StorageError` when
    the disk is full.
    """
    import torch
    from safetensors.torch import save_file

    file = GgufFile(source)
    architecture = find_architecture(file)
    target = getattr(torch, dtype)
    parameters = sum(math.prod(entry.shape) for entry in file.tensors.values())
    require_free_space(out.parent, parameters * target.itemsize + 64_000_000, "the unpacked model")
    tokenizer, tokenizer_config = read_tokenizer(file)
    with atomic_folder(out) as folder:
        tensors: dict[str, torch.Tensor] = {}
        for done, name in enumerate(file.tensors, 1):
            hf_name = architecture.hf_name(name)
            if hf_name is not None:
                tensors[hf_name] = torch.from_numpy(hf_tensor(file, name)).to(target)
            if progress:
                progress(done, len(file.tensors))
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        write_json(folder / "config.json", {**architecture.config(file), "dtype": dtype})
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2), encoding="utf-8")
        return write_manifest(
            folder,
            Manifest(
                kind="base",
                name=str(file.get("general.name", source.stem)),
                chat_format=chat_format,
                tokenizer_sha256=TextTokenizer.load(folder).sha256,
                license=file.get("general.license"),
                inputs={source.name: sha256_file(source)},
                settings={"dtype": dtype, "architecture": file.architecture},
                facts={"parameters": parameters},
                versions=library_versions("gguf", "safetensors", "tokenizers"),
            ),
        )
