"""Faults of special tokens: texts in the tokenizer's files, ids in the model's.

The tokenizer's texts are the authority: an id is right when it is that of the text. A text is wrong when it is empty, is no
token of the vocabulary, or when padding is the unknown token, which is a real input. Where a role has no right text anywhere,
the token that is called by the role's usual names stands in, or none does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from chaccu.weights.repair.draft import CONFIG, GENERATION, SPECIAL_TOKENS, TOKENIZER_CONFIG, Draft, Finding

_USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<PAD>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]"),
}
_ROLES = tuple(_USUAL)
# An AddedToken that was written by str() instead of as an object.
_SPELT_OUT = re.compile(r"""AddedToken\((?:content=)?(["'])(.*?)\1""")


def find_wrong_texts(draft: Draft) -> Iterator[Finding]:
    """Texts of special tokens that are none, in both files that have them."""
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        held = draft.get(name)
        if held is None:
            continue
        value, said = dict(held), []
        for role in _ROLES:
            key = f"{role}_token"
            problem = _find_form_problem(name, held.get(key)) or _find_text_problem(draft, role, held.get(key))
            if problem:
                value[key] = _find_text(draft, role, held[key])
                said.append((f"{key} {problem}", f"{key} becomes {value[key]}" if value[key] else f"{key} is left out"))
        if said:
            value = {key: token for key, token in value.items() if token is not None or held.get(key) is None}
            diff = draft.put(name, value)
            yield Finding(name, "; ".join(one for one, _ in said), "; ".join(other for _, other in said), diff=diff)
    yield from _find_unlike_texts(draft)


def _find_unlike_texts(draft: Draft) -> Iterator[Finding]:
    """Two files with two texts for one role: the one that transformers reads counts."""
    config, named = draft.get(TOKENIZER_CONFIG), draft.get(SPECIAL_TOKENS)
    if config is None or named is None:
        return
    # With the decoder in it, the configuration alone is read; without, special_tokens_map stands before it.
    is_config = "added_tokens_decoder" in config
    name, wrong, right = (SPECIAL_TOKENS, named, config) if is_config else (TOKENIZER_CONFIG, config, named)
    texts = {f"{role}_token": (read_text(wrong.get(f"{role}_token")), read_text(right.get(f"{role}_token"))) for role in _ROLES}
    unlike = {key: pair for key, pair in texts.items() if all(pair) and pair[0] != pair[1]}
    if unlike:
        diff = draft.put(name, {**wrong, **{key: text for key, (_, text) in unlike.items()}})
        other = TOKENIZER_CONFIG if is_config else SPECIAL_TOKENS
        said = "; ".join(f"{key} is {one} and {two} in {other}" for key, (one, two) in unlike.items())
        yield Finding(name, said, "; ".join(f"{key} becomes {text}" for key, (_, text) in unlike.items()), diff=diff)


def _find_form_problem(name: str, token: Any) -> str:
    """Objects are told from texts by their type in tokenizer_config.json, and have none in special_tokens_map.json."""
    if not isinstance(token, dict) or ("__type" in token) is (name == TOKENIZER_CONFIG):
        return ""
    return f"is an object {'without' if name == TOKENIZER_CONFIG else 'with'} __type, which transformers refuses"


def _find_text_problem(draft: Draft, role: str, token: Any) -> str:
    if token is None:
        return ""
    text = read_text(token)
    if not text:
        return f"is {token!r}"
    if isinstance(token, str) and _SPELT_OUT.match(token):
        return f"is {token!r}, which is Python and no token"
    if not _is_known(draft, text):
        return f"is {text}, which is no token of the vocabulary"
    unknown, end = _named_text(draft, "unk"), _named_text(draft, "eos")
    if role == "pad" and text == unknown != end:
        return f"is {text}, the unknown token, which is a real input"
    return ""


def read_text(token: Any) -> str:
    """A special token's text, however it is wrapped; "" when it has none."""
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return ""
    spelt = _SPELT_OUT.match(token)
    return spelt[2] if spelt else token


def _is_known(draft: Draft, text: str) -> bool:
    """Whether `text` is a token, or gets an id on loading that the embedding has a row for."""
    vocabulary = draft.vocabulary
    return vocabulary is None or vocabulary.has(text) or (draft.rows is not None and vocabulary.size < draft.rows)


def _find_text(draft: Draft, role: str, wrong: Any) -> str | None:
    """What stands in for a wrong text."""
    vocabulary = draft.vocabulary
    own, unknown = read_text(wrong), _named_text(draft, "unk")
    others = (read_text((draft.get(name) or {}).get(f"{role}_token")) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS))
    candidates = [own, *others, *(_USUAL[role] if vocabulary else ())]
    if role == "pad":
        candidates = [text for text in candidates if text != unknown]
        # A batch has to be filled with something, if the folder meant to fill it at all.
        candidates += [_named_text(draft, "eos") or ""] if own else []
    return next((text for text in candidates if text and (vocabulary is None or vocabulary.has(text))), None)


def _named_text(draft: Draft, role: str) -> str | None:
    """The role's text that is right: as the tokenizer's files have it, or as its class has it where they are silent."""
    files = [draft.get(name) or {} for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS)]
    named = [text for text in (read_text(held.get(f"{role}_token")) for held in files) if text]
    if not named and not any(f"{role}_token" in held for held in files) and role != "pad":
        is_llama = str(files[0].get("tokenizer_class", "")).startswith("LlamaTokenizer")
        named = list(_USUAL[role][:1]) if is_llama else []
    return next((text for text in named if draft.vocabulary is None or draft.vocabulary.has(text)), None)


def find_wrong_ids(draft: Draft) -> Iterator[Finding]:
    """Ids of special tokens that are no ids, or those of other tokens than the tokenizer's."""
    for name in (CONFIG, GENERATION):
        held = draft.get(name)
        if held is None:
            continue
        known = _SpecialIds(draft)
        value, said = dict(held), []
        for role in ("bos", "eos", "pad"):
            key = f"{role}_token_id"
            problem = known.find_problem(role, held.get(key))
            if problem:
                value[key] = known.mend(role, held[key])
                said.append(
                    (
                        f"{key} is {held[key]}, {problem}",
                        f"{key} becomes {value[key]}" if value[key] is not None else f"{key} is left out",
                    )
                )
        if said:
            value = {key: index for key, index in value.items() if index is not None or held.get(key) is None}
            diff = draft.put(name, value)
            yield Finding(name, "; ".join(one for one, _ in said), "; ".join(other for _, other in said), diff=diff)


class _SpecialIds:
    """The ids that the tokenizer's texts have; None for a role without one."""

    def __init__(self, draft: Draft) -> None:
        vocabulary = draft.vocabulary
        texts = {role: _named_text(draft, role) for role in _ROLES}
        self._ids = {role: vocabulary.ids.get(text) if vocabulary and text else None for role, text in texts.items()}
        self._texts = texts
        self._rows = draft.rows

    def find_problem(self, role: str, held: Any) -> str:
        """What is wrong with an id, or, of the end of a text, with one of several; "" when nothing is."""
        if held is None:
            return ""
        listed = held if isinstance(held, list) and role == "eos" else [held]
        odd = next((index for index in listed if not self._is_id(index)), None)
        if odd is not None or not listed:
            return f"which is no id below {self._rows:,}" if self._rows is not None else "which is no id"
        wanted, unknown = self._ids[role], self._ids["unk"]
        if wanted is not None and wanted not in listed:
            return f"and {self._texts[role]} is {wanted}"
        if wanted is None and unknown is not None and unknown in listed and unknown != self._ids["eos"]:
            return f"the unknown token {self._texts['unk']}"
        return ""

    def mend(self, role: str, held: Any) -> int | list[int] | None:
        """What the tokenizer says; of several ends those that can be ones stay behind it."""
        wanted = self._ids[role]
        if role != "eos" or not isinstance(held, list):
            return wanted
        wrong = {self._ids["unk"], self._ids["bos"], wanted}
        kept = [index for index in held if self._is_id(index) and index not in wrong]
        ends = [*([wanted] if wanted is not None else []), *kept]
        return ends if len(ends) > 1 else ends[0] if ends else None

    def _is_id(self, index: Any) -> bool:
        return type(index) is int and index >= 0 and (self._rows is None or index < self._rows)
