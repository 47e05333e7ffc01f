"""The tokenizer inside a GGUF file, as a `tokenizers.Tokenizer` and its configuration.

Two kinds are known: SentencePiece vocabularies with scores (`llama`: LLaMA 1 and 2, Mistral, Gemma), turned into an equal BPE
whose merges follow the scores, and byte-level BPE (`gpt2`) with a word pattern out of `word_patterns`. Another one is refused
by name, never approximated: a tokenizer that is nearly right gives ids the model never saw. `gguf_vocabulary` writes what is
read here.
"""

from __future__ import annotations

import re
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from chaccu.errors import WeightsError
from chaccu.weights.gguf_file import GgufFile
from chaccu.weights.word_patterns import WORD_PATTERNS, WordPattern

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"
PADDING = re.compile(r"\[PAD[0-9]+\]")


def read_tokenizer(file: GgufFile) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the contents of its `tokenizer_config.json`.

    Raises `WeightsError` for a vocabulary kind or word pattern that is not known.
    """
    kind = file.require("tokenizer.ggml.model")
    tokens = _read_tokens(file, kind)
    pattern = WORD_PATTERNS.get(file.get("tokenizer.ggml.pre", ""))
    if kind == "llama":
        tokenizer = _build_sentencepiece(file, tokens)
    elif kind == "gpt2" and pattern is not None:
        tokenizer = _build_byte_level(file, tokens, pattern)
    else:
        name = file.get("tokenizer.ggml.pre")
        raise WeightsError(
            f"{file.path} has a tokenizer of kind {kind!r} (word pattern {name!r}), which cannot be rebuilt exactly.",
            remedy="use the model's Hugging Face folder, which ships a tokenizer.json",
        )
    add_named_tokens(tokenizer, tokens, file.get("tokenizer.ggml.token_type", []))
    special = {name: _token_at(tokens, file.get(f"tokenizer.ggml.{key}_token_id")) for name, key in SPECIAL_KEYS.items()}
    special = {name: text for name, text in special.items() if text is not None}
    adds_bos = bool(file.get("tokenizer.ggml.add_bos_token", kind == "llama" or (pattern is not None and pattern.whole_words)))
    adds_eos = bool(file.get("tokenizer.ggml.add_eos_token", False))
    ends = [special.get(name) for name, adds in (("bos_token", adds_bos), ("eos_token", adds_eos)) if adds]
    if all(ends) and ends:
        template = [*([special["bos_token"]] if adds_bos else []), "$A", *([special["eos_token"]] if adds_eos else [])]
        named = [(text, tokenizer.token_to_id(text)) for text in ends if text is not None]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos, **special}
    if context := file.get(f"{file.architecture}.context_length"):
        config["model_max_length"] = context
    return tokenizer, config


def _read_tokens(file: GgufFile, kind: str) -> list[str]:
    """The vocabulary; SentencePiece's user-defined runs of spaces, which GGUF spells with spaces, get their mark back."""
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    if kind == "llama":
        types = file.get("tokenizer.ggml.token_type", [])
        for index, type_ in enumerate(types):
            if type_ == USER_DEFINED:
                tokens[index] = tokens[index].replace(" ", SPACE)
    return tokens


SPECIAL_KEYS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _token_at(tokens: list[str], index: int | None) -> str | None:
    return tokens[index] if index is not None and 0 <= index < len(tokens) else None


def _build_sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    vocabulary = _number_tokens(file, tokens)
    unknown = _token_at(tokens, file.get("tokenizer.ggml.unknown_token_id", 0))
    adds_space = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    return build_sentencepiece(vocabulary, file.require("tokenizer.ggml.scores"), unknown=unknown, adds_space=adds_space)


def build_sentencepiece(vocabulary: dict[str, int], scores: list[float], *, unknown: str | None, adds_space: bool) -> Tokenizer:
    """The BPE that is equal to a SentencePiece vocabulary. `scores`: by id; `unknown`: the token of what cannot be written
    otherwise; `adds_space`: whether a space is put before each text."""
    merges = merges_from_scores(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if adds_space else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    return tokenizer


def merges_from_scores(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """BPE merges equal to a SentencePiece vocabulary: each token's splits into two known tokens, best score first; among
    equal scores the longer left part first, then vocabulary order."""
    merges: list[tuple[float, int, int, int, int, int, str, str]] = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[index], -cut, cut - len(token), index, left, right, token[:cut], token[cut:]))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _build_byte_level(file: GgufFile, tokens: list[str], pattern: WordPattern) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(_number_tokens(file, tokens), merges, ignore_merges=pattern.whole_words))
    if pattern.normalizer is not None:
        tokenizer.normalizer = pattern.normalizer
    tokenizer.pre_tokenizer = pattern.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _number_tokens(file: GgufFile, tokens: list[str]) -> dict[str, int]:
    """Ids by text, without the rows of an embedding that no token has."""
    types = file.get("tokenizer.ggml.token_type", [])
    unused = {index for index, kind in enumerate(types) if kind == UNUSED and PADDING.fullmatch(tokens[index])}
    return {token: index for index, token in enumerate(tokens) if index not in unused}


def add_named_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control and user-defined tokens are matched in text before BPE; control ones are special. `types`: by id, as
    SentencePiece numbers them."""
    named = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in named if kind != USER_DEFINED]
    )
    # Where spaces have become marks before these are looked for.
    marked = SPACE if tokenizer.model.byte_fallback else "\0"
    tokenizer.add_tokens([AddedToken(token, normalized=marked in token) for token, kind in named if kind == USER_DEFINED])
