"""`TextTokenizer`: text pieces to token ids, with control tokens only where the caller put them.

It reads a `tokenizer.json` through the `tokenizers` library (no torch, no transformers). Invariants: text that comes from a
message never yields a special token, whatever it contains (`guarding` extends this to tokens that a format writes though the
tokenizer does not call them special); a piece that continues earlier text is encoded without the leading space mark that
SentencePiece-like tokenizers put before a text's first word, so ids of adjacent pieces may simply be joined. For those pieces
the same tokenizer is used with that one rule taken out of its definition.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from chaccu.conversation.word_pieces import ID_BYTES, WordPieces, adjacent_characters, pack_ids, unpack_ids
from chaccu.errors import TokenizerError

# What a model folder holds of its tokenizer; the last two where it has them.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_MANY_CHARS = 2_000_000
_MAX_SPLITS, _MAX_SPLIT_CHARS = 512, 256


class TextTokenizer:
    """A tokenizer with its named special tokens.

    `bos_token` and `eos_token` are texts ("" when the tokenizer has none). `adds_bos`: whether the tokenizer itself begins
    every text with its BOS token.
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
        self._continuing = _without_first_word_mark(backend)
        self._chars = 0
        self._guarding: dict[frozenset[str], TextTokenizer] = {}
        self._split: dict[str, tuple[str | int, ...]] = {}

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

    def __reduce__(self) -> tuple[Any, ...]:
        """By its definition, so that a worker process can be given it."""
        return _restore, (self._backend.to_str(), self.bos_token, self.eos_token)

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
        return {
            token.content: token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.content
        }

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that stand outside the vocabulary of plain text, such as the end of a turn."""
        return tuple(self._added)

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of `control_tokens`."""
        return frozenset(self._added.values())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of those control tokens that no text yields."""
        decoder = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in decoder.items() if token.special)

    def token_id(self, text: str) -> int | None:
        """The id of the single token `text`, or None."""
        token_id = self._backend.token_to_id(text)
        return None if token_id is None else int(token_id)

    def token_text(self, token_id: int) -> str:
        """The text of one token as the vocabulary spells it; "" when there is no such id."""
        return str(self._backend.id_to_token(token_id) or "")

    def guarding(self, texts: frozenset[str]) -> TextTokenizer:
        """This tokenizer with those of its added tokens that are among `texts` taken for special: text never yields them.

        The ids are the same. Tokens of blank space alone are left as they are: to a model they are plain text.
        """
        if texts not in self._guarding:
            self._guarding[texts] = self._build_guarding(texts)
        return self._guarding[texts]

    def _build_guarding(self, texts: frozenset[str]) -> TextTokenizer:
        added = self._backend.get_added_tokens_decoder().values()
        plain = {token.content for token in added if not token.special and token.content.strip(" \t\n\r▁")}
        if plain.isdisjoint(texts):
            return self
        backend = Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in sorted(plain & texts)])
        return TextTokenizer(backend, bos_token=self.bos_token, eos_token=self.eos_token)

    def split_control(self, text: str) -> list[str | int]:
        """Template text cut at the tokenizer's added tokens: runs of plain text, and ids where a control token stands."""
        # A template writes the same few texts again and again, and thousands of added tokens make the pattern slow.
        parts = self._split.get(text)
        if parts is None:
            parts = tuple(self._added.get(part, part) for part in self._added_pattern.split(text) if part)
            if len(text) <= _MAX_SPLIT_CHARS and len(self._split) < _MAX_SPLITS:
                self._split[text] = parts
        return list(parts)

    def encode_texts(self, texts: Sequence[str], *, first: Sequence[bool]) -> list[list[int]]:
        """Ids of each text, none of them special. `first[i]`: whether text i begins a sequence (and may get the mark)."""
        return list(map(unpack_ids, self.pack_texts(texts, first=first)))

    def pack_texts(self, texts: Sequence[str], *, first: Sequence[bool]) -> list[bytes]:
        """The ids that `encode_texts` gives, each text's as 32-bit integers in the machine's order: no object for each id."""
        if self._continuing is self._backend:
            return self._pack_continuing(texts)
        begun = [text for text, is_first in zip(texts, first, strict=True) if is_first]
        continued = [text for text, is_first in zip(texts, first, strict=True) if not is_first]
        begun_ids, continued_ids = iter(self._pack_beginning(begun)), iter(self._pack_continuing(continued))
        return [next(begun_ids if is_first else continued_ids) for is_first in first]

    def count_texts(self, texts: Sequence[str], *, first: Sequence[bool]) -> list[int]:
        """How many ids `encode_texts` gives for each text."""
        return [len(packed) // ID_BYTES for packed in self.pack_texts(texts, first=first)]

    def _pack_beginning(self, texts: Sequence[str]) -> list[bytes]:
        words = self._words_for(texts)
        if words is None or self._marks_after_added:
            return _pack_batch(self._backend, texts)
        split = [words.split(text) for text in texts]
        begun = _pack_batch(self._backend, ["".join(text[:1]) for text in split])
        rest = words.encode_words([text[1:] for text in split])
        return [first + others for first, others in zip(begun, rest, strict=True)]

    @cached_property
    def _marks_after_added(self) -> bool:
        """Whether the first-word mark may stand elsewhere than at the beginning: behind an added token found in the text."""
        return any(not token.special for token in self._backend.get_added_tokens_decoder().values())

    def _pack_continuing(self, texts: Sequence[str]) -> list[bytes]:
        words = self._words_for(texts)
        return _pack_batch(self._continuing, texts) if words is None else words.encode_texts(texts)

    def _words_for(self, texts: Sequence[str]) -> WordPieces | None:
        """The way by words, once there is so much text that looking through the vocabulary for it pays."""
        if self._chars < _MANY_CHARS:
            self._chars += sum(map(len, texts))
            return None
        return self._word_pieces

    @cached_property
    def _word_pieces(self) -> WordPieces | None:
        pairs = adjacent_characters(self._continuing)
        return None if pairs is None else WordPieces(partial(_pack_batch, self._continuing), pairs)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))


def _restore(definition: str, bos_token: str, eos_token: str) -> TextTokenizer:
    return TextTokenizer(Tokenizer.from_str(definition), bos_token=bos_token, eos_token=eos_token)


def _pack_batch(backend: Tokenizer, texts: Sequence[str]) -> list[bytes]:
    return [pack_ids(encoding.ids) for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _without_first_word_mark(backend: Tokenizer) -> Tokenizer:
    """`backend` with nothing put before a text's first word; `backend` itself when it puts nothing there."""
    # The state of a part is its definition in JSON: much quicker to read than a tokenizer with a large vocabulary.
    parts = {
        name: json.loads(part.__getstate__())
        for name, part in (("normalizer", backend.normalizer), ("pre_tokenizer", backend.pre_tokenizer))
        if part is not None
    }
    changed = {name: _drop_mark(definition) for name, definition in parts.items()}
    if changed == parts:
        return backend
    continuing = Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), **changed}))
    continuing.encode_special_tokens = backend.encode_special_tokens
    return continuing


def _drop_mark(step: Any) -> Any:
    """A normalizer's or pre-tokenizer's definition without the rule that marks the first word; None if that was all."""
    if step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [kept for kept in map(_drop_mark, step[key]) if kept is not None]}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {name: never.get(name, value) for name, value in step.items()}


def _read_config(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _token_text(token: Any) -> str:
    """A special token's text; older files wrap it in an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
