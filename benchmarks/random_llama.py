"""A LLaMA with random bfloat16 weights as a folder that any engine loads, and prompts in its words.

    python benchmarks/random_llama.py FOLDER --shape 1b

The tokenizer is a byte-level BPE whose merges spell words out of syllables, ` babe` or ` babed`: prompts of such words have as
many tokens as words. No answer ends by itself: the logits of control tokens, and of single bytes, which need not be text, are
0, and a likeliest token has more.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import cache
from itertools import islice, product
from pathlib import Path

from shapes import SEQUENCE_LEN, SHAPES, VOCABULARY
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHAT_FORMAT = "chatml"
_CONTROL = ("<unk>", "<|im_start|>", "<|im_end|>")
_UNSAID = len(_CONTROL) + 256
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
_SPACE = "Ġ"  # as byte-level tokenizers write it


@cache
def _list_merges() -> list[tuple[str, str]]:
    """In their order: syllables, pairs of them, these with the space before, and some with one more consonant."""
    syllables = ["".join(letters) for letters in product(_CONSONANTS, _VOWELS)]
    pairs = list(product(syllables, syllables))
    words = [_SPACE + "".join(pair) for pair in pairs]
    merges = [*product(_CONSONANTS, _VOWELS), *pairs, *((_SPACE, "".join(pair)) for pair in pairs)]
    return [*merges, *islice(product(words, _CONSONANTS), VOCABULARY - _UNSAID - len(merges))]


@cache
def _list_words() -> list[str]:
    return [" " + word[1:] for word in map("".join, _list_merges()) if word.startswith(_SPACE)]


def choose_prompt(number: int, tokens: int) -> str:
    """A prompt that no other number has."""
    return "".join(random.Random(number).choices(_list_words(), k=tokens))


def write_tokenizer(folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`."""
    merges = _list_merges()
    tokens = [*_CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: one for one, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": _CONTROL[0], "eos_token": _CONTROL[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_model(folder: Path, shape: str) -> None:
    """The whole folder; on a GPU where there is one, for a processor draws slowly."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    width, layers, heads, groups, inner = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQUENCE_LEN,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.lm_head.weight[:_UNSAID] = 0
    model.save_pretrained(str(folder))


def main() -> None:
    """Write it."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path)
    cli.add_argument("--shape", choices=sorted(SHAPES), required=True)
    options = cli.parse_args()
    write_model(options.folder, options.shape)


if __name__ == "__main__":
    main()
