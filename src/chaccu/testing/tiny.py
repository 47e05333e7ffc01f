"""A tokenizer and models too small to be any good: real files in a real folder, built in well under a second.

Invariant: equal calls write equal weights and an equal tokenizer, which knows the control tokens of the `chatml` and `gemma-3`
formats.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from chaccu.artifact import Manifest, manifest_sha256, read_manifest, weights_sha256, write_manifest
from chaccu.conversation import TextTokenizer

BOS, EOS = "<bos>", "<|im_end|>"
_CONTROL = (BOS, "<eos>", "<|im_start|>", EOS, "<start_of_turn>", "<end_of_turn>")
_TEXTS = (
    "system\nuser\nassistant\nmodel\ntool\n",
    "You are a helpful assistant who answers every question in one short sentence.",
    "What colour is the sky at noon? The sky is blue, and the grass below it is green.",
    "How do I boil an egg? Put it into hot water, wait for seven minutes, then cool it.",
    "Tell me a story about a llama. A llama walked down from the mountain to see the sea.",
)

_DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# What each of them is made of in little: transformers' own model types and values.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_DECODER},
    "mistral": {"model_type": "mistral", **_DECODER, "sliding_window": 32},
    "qwen2": {"model_type": "qwen2", **_DECODER},
    "qwen3": {"model_type": "qwen3", **_DECODER, "head_dim": 16},
    # Layers, heads and positions of distilgpt2 (Sanh et al. 2019, arXiv:1910.01108); its width is 768.
    "distilgpt2": {"model_type": "gpt2", "n_embd": 96, "n_layer": 6, "n_head": 12, "n_positions": 1024},
    # As Gemma 3 270M (Gemma 3 technical report, 2025), where every sixth layer sees everything; its width is 640.
    "gemma-3": {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
}


def build_tokenizer(folder: Path) -> TextTokenizer:
    """Write `tokenizer.json` and `tokenizer_config.json` of a byte-level BPE with some 400 tokens; it adds no BOS by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(_CONTROL),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return TextTokenizer.load(folder)


def build_llama(folder: Path, **fields: Any) -> Path:
    """Write a random LLaMA (float32, two layers, some 0.1 million weights) as a base model for `chatml`; returns `folder`.

    `fields` are put into its config.
    """
    return build_model(folder, "llama", **fields)


def build_model(folder: Path, architecture: str, *, chat_format: str = "chatml", **fields: Any) -> Path:
    """Write a random model of one of `ARCHITECTURES` as a base for `chat_format`, with its tokenizer; returns `folder`.

    `fields` are put into its config. Draws from a generator of its own: torch's global one is left as it was.
    """
    import torch
    import transformers

    tokenizer = build_tokenizer(folder)
    ends = {"bos": tokenizer.bos_id, "eos": tokenizer.token_id(EOS), "pad": tokenizer.token_id("<eos>")}
    values = {
        "vocab_size": tokenizer.vocab_size,
        **{f"{name}_token_id": value for name, value in ends.items()},
        **ARCHITECTURES[architecture],
        **fields,
    }
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(str(folder))
    manifest = Manifest(kind="base", name=f"tiny-{architecture}", chat_format=chat_format, tokenizer_sha256=tokenizer.sha256)
    write_manifest(folder, manifest)
    return folder


def build_adapter(folder: Path, base: Path, *, seed: int = 1, token_rows: list[int] | None = None) -> Path:
    """Write a random LoRA adapter of all linear layers of `base`, with the manifest that training writes; returns `folder`.

    `token_rows`: tokens whose rows of embedding and projection are trained with it. Leaves torch's global generator as it was.
    """
    import peft
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # As training does: peft ties the rows of both by itself where the weights are tied.
    ends = [embedding] if embedding.weight is head.weight else [embedding, head]
    rows: dict[str, list[int]] | None = None
    if token_rows:
        rows = {name.rpartition(".")[2]: token_rows for name, module in model.named_modules() if module in ends}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", trainable_token_indices=rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            # Of transformers by an old name, and that it sets for a Conv1D what it knows.
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(folder))
    parent = read_manifest(base)
    manifest = Manifest(
        kind="adapter",
        name=folder.name,
        chat_format=parent.chat_format,
        tokenizer_sha256=parent.tokenizer_sha256,
        parents={"base": manifest_sha256(base)},
        facts={"base_weights": weights_sha256(parent)},
    )
    write_manifest(folder, manifest)
    return folder
