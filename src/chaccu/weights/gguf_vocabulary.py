"""A tokenizer.json as GGUF's metadata: the inverse of `gguf_tokenizer`.

Two kinds are written: SentencePiece-like BPE with byte fallback (`llama`), whose merges become scores, and byte-level BPE
(`gpt2`) with a word pattern that llama.cpp has a name for. Invariants: every id keeps its text; what llama.cpp would read
otherwise is refused by name, but for the differences that `Vocabulary` names.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, pre_tokenizers

from chaccu.errors import WeightsError
from chaccu.weights.gguf_file import PairValue
from chaccu.weights.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    SPECIAL_KEYS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_from_scores,
)
from chaccu.weights.word_patterns import find_word_pattern

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_REMEDY = "serve the Hugging Face folder itself"
_FIRST_WORD = (
    "llama.cpp puts a space before every text and behind every control token, this tokenizer before a text that does not "
    "begin with one: a text that does, and the text behind a control token, become other ids there"
)

_RUNS = f"a literal {SPACE} beside spaces becomes other ids in llama.cpp, which looks for runs of spaces before it marks them"
# Whatever a file says of them; found by asking it.
_TAKEN_FOR_CONTROL = frozenset(
    [
        "</s>",
        "<eos>",
        "[EOS]",
        "<EOT>",
        "_<EOT>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<end_of_turn>",
        "<turn|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|tool_response>",
        "<SUF>",
        "<MID>",
        "<reponame>",
        "<|file_sep|>",
        "<|fim_pad|>",
        "[e~[",
    ]
)


class Vocabulary(msgspec.Struct, frozen=True):
    """`pairs`: GGUF's metadata of a tokenizer. `differences`: where llama.cpp's own tokenizer is known to differ from it, in
    words; Chaccu's engines give it ids."""

    pairs: dict[str, PairValue]
    differences: list[str]


class _Source(msgspec.Struct, frozen=True):
    """A tokenizer's parts. `texts`: by id, without holes; `named`: the added tokens, by id."""

    where: str
    backend: Tokenizer
    definition: dict[str, Any]
    texts: list[str]
    named: dict[int, dict[str, Any]]
    unused: frozenset[int]

    @property
    def model(self) -> dict[str, Any]:
        model: dict[str, Any] = self.definition["model"]
        return model


def write_vocabulary(folder: Path, rows: int, *, turn_end: str | None = None) -> Vocabulary:
    """The metadata for the tokenizer in `folder`, with a text for each of the `rows` of its model's embedding.

    `turn_end`: the token that ends an assistant's turn, where it is another than the end of a text. Raises `WeightsError` for a
    tokenizer that llama.cpp does not know.
    """
    source = _read(folder, rows)
    if source.model.get("byte_fallback"):
        pairs, differences = _write_sentencepiece(source)
    else:
        pairs, differences = _write_byte_level(source)
    plain = [token["content"] for token in source.named.values() if not token["special"]]
    taken = ", ".join(text for text in plain if text in _TAKEN_FOR_CONTROL)
    if taken:
        differences = [*differences, f"llama.cpp takes {taken} for control tokens, which a text does not yield there"]
    return Vocabulary({**pairs, **_write_special(source, folder, turn_end)}, differences)


def _read(folder: Path, rows: int) -> _Source:
    where = f"the tokenizer in {folder}"
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception for whatever is wrong with the file
        raise WeightsError(f"{folder / 'tokenizer.json'} is not a readable tokenizer: {error}.") from error
    definition: dict[str, Any] = json.loads(backend.to_str())
    model = definition["model"]
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] != "BPE" or odd:
        raise WeightsError(
            f"{where} is of the kind {model['type']} {' '.join(odd)}; BPE can be written as GGUF.", remedy=_REMEDY
        )
    named = {token["id"]: token for token in definition["added_tokens"]}
    known = {
        **{index: text for text, index in model["vocab"].items()},
        **{index: token["content"] for index, token in named.items()},
    }
    if known and max(known) >= rows:
        raise WeightsError(
            f"{where} has ids up to {max(known):,}, and the model's embedding has {rows:,} rows.",
            remedy=f"chaccu weights repair {folder}",
        )
    for token in named.values():
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token[flag]]
        if flags:
            raise WeightsError(
                f"{where} matches {token['content']!r} with {flags[0]}, which llama.cpp does not.", remedy=_REMEDY
            )
    texts = [known.get(index, f"[PAD{index}]") for index in range(rows)]
    return _Source(where, backend, definition, texts, named, frozenset(range(rows)) - set(known))


def _write_byte_level(source: _Source) -> tuple[dict[str, PairValue], list[str]]:
    pattern = find_word_pattern(source.backend, source.where)
    if bool(source.model.get("ignore_merges")) != pattern.whole_words:
        raise WeightsError(
            f"{source.where} has ignore_merges {not pattern.whole_words}, which llama.cpp does not do with the word pattern "
            f"{pattern.name}.",
            remedy=_REMEDY,
        )
    _require_bytes(source, pre_tokenizers.ByteLevel.alphabet())
    import numpy as np

    kinds = [_kind(source, index, NORMAL) for index in range(len(source.texts))]
    pairs: dict[str, PairValue] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pattern.name,
        "tokenizer.ggml.tokens": source.texts,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in _merges(source)],
    }
    return pairs, [pattern.difference] if pattern.difference else []


def _write_sentencepiece(source: _Source) -> tuple[dict[str, PairValue], list[str]]:
    import numpy as np

    adds_space, differences = _read_first_word(source)
    _require_bytes(source, [f"<0x{byte:02X}>" for byte in range(256)])
    unknown = source.model.get("unk_token")
    texts, kinds = list(source.texts), []
    for index, text in enumerate(source.texts):
        kind = UNKNOWN if text == unknown else BYTE if _BYTE.fullmatch(text) else NORMAL
        kinds.append(_kind(source, index, kind))
        if kinds[-1] == USER_DEFINED:
            if adds_space and source.named[index]["normalized"]:
                raise WeightsError(
                    f"{source.where} matches {text!r} behind a space only, which llama.cpp does not.", remedy=_REMEDY
                )
            # llama.cpp looks for these in the text as it is, before spaces become marks.
            texts[index] = text.replace(SPACE, " ")
    if texts != source.texts:
        differences = [*differences, _RUNS]
    pairs: dict[str, PairValue] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": np.array(_scores(source), np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.add_space_prefix": adds_space,
    }
    return pairs, differences


def _kind(source: _Source, index: int, plain: int) -> int:
    token = source.named.get(index)
    if token is None or plain == UNKNOWN:
        return UNUSED if index in source.unused else plain
    return CONTROL if token["special"] else USER_DEFINED


def _require_bytes(source: _Source, spellings: list[str]) -> None:
    missing = next((text for text in sorted(spellings) if text not in source.model["vocab"]), None)
    if missing is not None:
        raise WeightsError(
            f"{source.where} has no token for the byte {missing!r}, without which llama.cpp stops.", remedy=_REMEDY
        )


def _read_first_word(source: _Source) -> tuple[bool, list[str]]:
    """Whether a space is put before a text's first word, and how llama.cpp differs."""
    normalizer, cut = source.definition["normalizer"], source.definition["pre_tokenizer"]
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    # Gemma's, which has nothing left to cut once the spaces are marks.
    idle = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if cut in (None, idle):
        if normalizer == {"type": "Sequence", "normalizers": [prepend, mark]}:
            return True, []
        if normalizer in (mark, {"type": "Sequence", "normalizers": [mark]}):
            return False, []
    if (
        normalizer is None
        and isinstance(cut, dict)
        and cut["type"] == "Metaspace"
        and not cut["split"]
        and cut["replacement"] == SPACE
    ):
        scheme = cut["prepend_scheme"]
        return scheme != "never", [] if scheme == "never" else [_FIRST_WORD]
    raise WeightsError(
        f"{source.where} prepares text in a way that llama.cpp does not know: normalizer "
        f"{json.dumps(normalizer, ensure_ascii=False)}, pre_tokenizer {json.dumps(cut, ensure_ascii=False)}.",
        remedy=_REMEDY,
    )


def _merges(source: _Source) -> list[tuple[str, str]]:
    """Pairs in their order, however the file spells them."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in source.model["merges"])
    return [(left, right) for left, right in pairs]


def _scores(source: _Source) -> list[float]:
    """A score for each id, such that merging the best score first is merging in the order of the merges.

    llama.cpp merges any two neighbours that make a token, the best score first (SentencePiece's BPE): the merges must be all of
    those, one token's after the other's; tokens whose merges are mixed with one another get the same score. Raises
    `WeightsError` where no scores say the same.
    """
    vocabulary: dict[str, int] = source.model["vocab"]
    merges = _merges(source)
    groups = _group_by_rank([left + right for left, right in merges])
    scores = [0.0] * len(source.texts)
    for text, group in groups.items():
        scores[vocabulary[text]] = -float(group)
    rebuilt = merges_from_scores(vocabulary, scores)
    if rebuilt == merges:
        return scores
    # Of control tokens SentencePiece merges none, and llama.cpp does; nothing that is written here could keep it from that.
    control = {token["content"] for token in source.named.values()}
    extra = [pair for pair in set(rebuilt) - set(merges) if pair[0] + pair[1] not in control]
    if extra:
        left, right = min(extra, key=lambda pair: vocabulary[pair[0] + pair[1]])
        raise WeightsError(
            f"{source.where} never merges {left!r} with {right!r}, which llama.cpp would: {left + right!r} is a token.",
            remedy=_REMEDY,
        )
    sizes = Counter(groups.values())
    mixed = {text for text, group in groups.items() if sizes[group] > 1}
    if [pair for pair in rebuilt if pair[0] + pair[1] in mixed] != [pair for pair in merges if pair[0] + pair[1] in mixed]:
        raise WeightsError(f"{source.where} orders its merges in a way that no scores say.", remedy=_REMEDY)
    return scores


def _group_by_rank(made: list[str]) -> dict[str, int]:
    """The number of its group by token, where `made` has the token that each merge makes: tokens whose ranges of ranks overlap
    are one group."""
    last = {text: rank for rank, text in enumerate(made)}
    groups: dict[str, int] = {}
    group, end = 0, -1
    for rank, text in enumerate(made):
        if text in groups:
            continue
        if rank > end:
            group += 1
        end = max(end, last[text])
        groups[text] = group
    return groups


def _write_special(source: _Source, folder: Path, turn_end: str | None) -> dict[str, PairValue]:
    """Ids of the special tokens, and which of them the tokenizer adds by itself."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    pairs: dict[str, PairValue] = {}
    ids: dict[str, int] = {}
    for name, key in SPECIAL_KEYS.items():
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        index = source.backend.token_to_id(text) if isinstance(text, str) else None
        if index is not None:
            ids[name] = pairs[f"tokenizer.ggml.{key}_token_id"] = index
    end = source.backend.token_to_id(turn_end) if turn_end else None
    if end is not None and end != ids.get("eos_token"):
        pairs["tokenizer.ggml.eot_token_id"] = end
    plain = source.backend.encode("a", add_special_tokens=False).ids
    added = source.backend.encode("a", add_special_tokens=True).ids
    adds_bos = len(added) > len(plain) and added[0] == ids.get("bos_token")
    adds_eos = len(added) > len(plain) + adds_bos and added[-1] == ids.get("eos_token")
    expected = [*added[:1], *plain] if adds_bos else plain
    if added != ([*expected, added[-1]] if adds_eos else expected):
        raise WeightsError(
            f"{source.where} adds more to a text than its BOS and EOS tokens: {added} for {plain}.", remedy=_REMEDY
        )
    return {**pairs, "tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_eos_token": adds_eos}
