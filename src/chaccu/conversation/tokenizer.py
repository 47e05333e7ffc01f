"""`TextTokenizer`: text pieces to token ids, with control tokens only where the caller put them.

It reads a `tokenizer.json` through the `tokenizers` library (no torch, no transformers). Invariants: text that comes from a message
never yields a special token, whatever it contains; a piece that continues earlier text is encoded without the leading space
mark that SentencePiece-like tokenizers put before a text's first word, so ids of adjacent pieces may simply be joined.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from chaccu.errors import TokenizerError

_ANCHOR = "\n"


class TextTokenizer:
    """A tokenizer with its named special tokens.

    `bos_token` and `eos_token` are texts ("" when the tokenizer has none). `adds_bos`: whether the tokenizer itself begins every
    text with its BOS token.
    """

    def __init__(self, backend: Tokenizer, *, bos_token: str = "", eos_token: str = "") -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        bare = backend.encode("a", add_special_tokens=True).ids
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_id = backend.token_to_id(bos_token) if bos_token else None
        self.adds_bos = self.bos_id is not None and bool(bare) and bare[0] == self.bos_id
        backend.encode_special_tokens = True
        self._marks_first_word = backend.encode("a", add_special_tokens=False).ids != self._encode_after_anchor(["a"])[0]

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """From a folder with `tokenizer.json` (and `tokenizer_config.json`), or from the file itself.

        Raises `TokenizerError` when the file is missing or unreadable.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(
                f"there is no tokenizer.json in {path}.",
                remedy="name a model folder; one with only tokenizer.model is converted by saving it once with transformers",
            )
        try:
            backend = Tokenizer.from_file(str(file))
            config = _read_config(file.with_name("tokenizer_config.json"))
        except Exception as error:  # tokenizers raises bare Exception for whatever is wrong with the file
            raise TokenizerError(f"{file} is not a readable tokenizer: {error}.") from error
        return cls(backend, bos_token=_token_text(config.get("bos_token")), eos_token=_token_text(config.get("eos_token")))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def sha256(self) -> str:
        """Identity of the tokenizer: SHA-256 of its canonical JSON."""
        return hashlib.sha256(self._backend.to_str(pretty=False).encode()).hexdigest()

    @cached_property
    def _added(self) -> dict[str, int]:
        return {token.content: token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.content}

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")

    def token_id(self, text: str) -> int | None:
        """The id of the single token `text`, or None."""
        token_id = self._backend.token_to_id(text)
        return None if token_id is None else int(token_id)

    def split_control(self, text: str) -> list[str | int]:
        """Template text cut at the tokenizer's added tokens: runs of plain text, and ids where a control token stands."""
        return [self._added.get(part, part) for part in self._added_pattern.split(text) if part]

    def encode_texts(self, texts: Sequence[str], *, first: Sequence[bool]) -> list[list[int]]:
        """Ids of each text, none of them special. `first[i]`: whether text i begins a sequence (and may get the first-word mark)."""
        if not self._marks_first_word:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        plain = iter(self._backend.encode_batch_fast([t for t, f in zip(texts, first, strict=True) if f], add_special_tokens=False))
        continued = iter(self._encode_after_anchor([t for t, f in zip(texts, first, strict=True) if not f]))
        return [next(plain).ids if is_first else next(continued) for is_first in first]

    def _encode_after_anchor(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text as if it followed a newline, and cut the newline's tokens off by their offsets."""
        results = []
        for text, encoding in zip(texts, self._backend.encode_batch([_ANCHOR + t for t in texts], add_special_tokens=False), strict=True):
            cut = next((i for i, (_, end) in enumerate(encoding.offsets) if end > len(_ANCHOR)), len(encoding.ids))
            if text and cut < len(encoding.ids) and encoding.offsets[cut][0] < len(_ANCHOR):
                # The newline merged with the text: only a text that itself begins with white space can do that.
                cut = -1
            results.append(encoding.ids[cut:] if cut >= 0 else self._backend.encode(text, add_special_tokens=False).ids)
        return results

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))


def _read_config(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _token_text(token: Any) -> str:
    """A special token's text; older files wrap it in an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
