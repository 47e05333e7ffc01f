"""In what two folders of one architecture differ beside their weights: what their configs compute, and their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chaccu.artifact import sha256_file
from chaccu.conversation import TextTokenizer

# Who wrote a config and how, and what generation begins and ends with: nothing that the weights were trained for.
_BOOKKEEPING = frozenset(
    {
        *(
            "_name_or_path",
            "_attn_implementation",
            "architectures",
            "dtype",
            "torch_dtype",
            "transformers_version",
            "use_cache",
        ),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }
)


def find_config_difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first field that is another in both, in words; None when there is none. A field that one of them leaves to the
    architecture's default is not compared: versions of transformers write others."""
    for key, value in first.items():
        theirs = other.get(key)
        if key not in _BOOKKEEPING and value is not None and theirs is not None and value != theirs:
            return f"{key} in config.json is {theirs!r} in it and {value!r} in the first"
    return None


def find_tokenizer_difference(first: Path, other: Path) -> str | None:
    """How the tokenizers of two folders differ, in words; None when they are one, or are not there."""
    if all((folder / "tokenizer.json").is_file() for folder in (first, other)):
        ours, theirs = TextTokenizer.load(first), TextTokenizer.load(other)
        if ours.sha256 == theirs.sha256:
            return None
        for token_id in range(max(ours.vocab_size, theirs.vocab_size)):
            if ours.token_text(token_id) != theirs.token_text(token_id):
                return (
                    f"token {token_id} is {theirs.token_text(token_id)!r} in it and {ours.token_text(token_id)!r} in the first"
                )
        return "the tokenizers have the same tokens and split text in other ways"
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model") for folder in (first, other)]
    for ours_file, theirs_file in (files[:2], files[2:]):
        if ours_file.is_file() != theirs_file.is_file():
            return f"only one of them has a {ours_file.name}"
        if ours_file.is_file() and sha256_file(ours_file) != sha256_file(theirs_file):
            return f"{ours_file.name} is another"
    return None
