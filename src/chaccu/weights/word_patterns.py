"""The ways of cutting a text into words before byte-level BPE that llama.cpp knows by name (`tokenizer.ggml.pre`).

Invariant: a way is recognised by its whole definition in tokenizer.json, normalizer included, or not at all: a pattern that is
nearly right gives ids that the model never saw. It ignores what only moves offsets (`trim_offsets`).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from chaccu.errors import WeightsError

# What several families share: contractions in either case, letters with one sign before them, …, blank space up to a word.
_CONTRACTIONS, _LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class WordPattern(NamedTuple):
    """`name`: llama.cpp's. `whole_words`: a word that is a token is taken whole, whatever the merges say (`ignore_merges`).
    `difference`: where llama.cpp's own tokenizer still differs from the definition; "" if nowhere."""

    name: str
    pre_tokenizer: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    whole_words: bool = False
    difference: str = ""


def _cut_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


WORD_PATTERNS: dict[str, WordPattern] = {
    pattern.name: pattern
    for pattern in (
        WordPattern("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        WordPattern("llama-bpe", _cut_by(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"), whole_words=True),
        WordPattern(
            "qwen2",
            _cut_by(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"),
            normalizers.NFC(),
            difference="llama.cpp does not compose characters: text that is not in Unicode's form NFC becomes other ids there",
        ),
        WordPattern(
            "smollm",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        ),
    )
}


def find_word_pattern(tokenizer: Tokenizer, name: str) -> WordPattern:
    """The one that `tokenizer` cuts by; `name` says whose it is in the `WeightsError` for one that is not known."""
    for pattern in WORD_PATTERNS.values():
        same = _define(pattern.pre_tokenizer) == _define(tokenizer.pre_tokenizer)
        if same and _define(pattern.normalizer) == _define(tokenizer.normalizer):
            return pattern
    raise WeightsError(
        f"{name} cuts text into words in a way that llama.cpp has no name for: {_shorten(_define(tokenizer.pre_tokenizer))}, "
        f"with the normalizer {_shorten(_define(tokenizer.normalizer))}; {', '.join(WORD_PATTERNS)} are known.",
        remedy="serve the Hugging Face folder itself",
    )


def _define(part: Any) -> Any:
    """The definition of a part of a tokenizer, without what changes no ids."""
    return None if part is None else _strip(json.loads(part.__getstate__()))


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strip(one) for key, one in value.items() if key != "trim_offsets"}
    return [_strip(one) for one in value] if isinstance(value, list) else value


def _shorten(definition: Any) -> str:
    text = json.dumps(definition, ensure_ascii=False)
    return text if len(text) <= 160 else text[:159] + "…"
