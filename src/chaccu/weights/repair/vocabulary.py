"""What the faults of special tokens ask of a tokenizer: which text is which id, and what it puts before a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec


class Vocabulary(msgspec.Struct, frozen=True):
    """Ids by token text, added tokens included; `adds_bos`: whether the tokenizer begins every text with a token of its own."""

    ids: dict[str, int]
    adds_bos: bool = False

    @property
    def size(self) -> int:
        """Rows that an embedding needs for it."""
        return max(self.ids.values(), default=-1) + 1

    def has(self, text: str | None) -> bool:
        """Whether `text` is one of its tokens."""
        return text is not None and text in self.ids


def read_vocabulary(tokenizer: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary of a tokenizer.json; None when it is not of a known form."""
    model = tokenizer.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, dict):
        ids = dict(listed)
    elif isinstance(listed, list):
        ids = {str(entry[0]): at for at, entry in enumerate(listed) if isinstance(entry, list) and entry}
    else:
        return None
    for token in tokenizer.get("added_tokens") or []:
        ids[token["content"]] = token["id"]
    if not all(type(index) is int and index >= 0 for index in ids.values()):
        return None
    return Vocabulary(ids, adds_bos=any(_first_steps(tokenizer.get("post_processor"))))


def _first_steps(step: Any) -> Iterator[bool]:
    """Whether each template of a post-processor begins with a special token."""
    if not isinstance(step, dict):
        return
    if step.get("type") == "Sequence":
        for part in step.get("processors") or []:
            yield from _first_steps(part)
    elif step.get("type") == "TemplateProcessing":
        yield bool(step.get("single")) and "SpecialToken" in step["single"][0]
