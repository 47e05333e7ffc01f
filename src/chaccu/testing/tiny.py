"""A tokenizer and a LLaMA too small to be any good: real files in a real folder, built in well under a second.

Invariant: equal calls write equal weights and an equal tokenizer, which knows the control tokens of the `chatml` and `gemma-3`
formats.
"""

from __future__ import annotations

import json
from pathlib import Path

from chaccu.artifact import Manifest, write_manifest
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


def build_llama(folder: Path, *, tie_word_embeddings: bool = False) -> Path:
    """Write a random LLaMA (float32, two layers, some 0.1 million weights) as a base model for `chatml`; returns `folder`.

    Draws from a generator of its own: torch's global one is left as it was.
    """
    import torch
    import transformers

    tokenizer = build_tokenizer(folder)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.token_id(EOS),
        pad_token_id=tokenizer.token_id("<eos>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(str(folder))
    manifest = Manifest(kind="base", name="tiny-llama", chat_format="chatml", tokenizer_sha256=tokenizer.sha256)
    write_manifest(folder, manifest)
    return folder
