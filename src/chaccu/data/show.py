"""A conversation for the terminal: by role, or as a chat format writes it with the trained tokens coloured.

Invariant: the coloured view comes from `encode_conversation`'s own ids and mask, the ones that training uses, so what is
green is what is trained. Control characters are shown, never sent to the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chaccu.conversation import ChatFormat, Conversation, TextTokenizer, encode_conversation, resolve_format
from chaccu.data.records import read_conversations
from chaccu.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

_ROLE_STYLES = (("user", "bold cyan"), ("assistant", "bold green"), ("tool", "bold yellow"))
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class MaskRun(msgspec.Struct, frozen=True):
    """Text of neighbouring tokens that are all trained or all only read."""

    text: str
    trained: bool
    tokens: int


def pick_conversation(path: Path, index: int) -> Conversation:
    """Conversation number `index` (from 0) of a JSONL file, or of a dataset folder's training file.

    Raises `UsageError` when the file has fewer, `StorageError` or `DataError` when it cannot be read.
    """
    file = path / "train.jsonl" if path.is_dir() else path
    found: Iterator[Conversation] = islice(read_conversations(file), index, None)
    conversation = next(found, None)
    if conversation is None:
        count = sum(1 for _ in read_conversations(file))
        raise UsageError(f"there is no conversation {index} in {file}: it holds {count:,}.", remedy=f"use 0 to {count - 1}")
    return conversation


def format_turns(conversation: Conversation) -> Text:
    """The turns under their roles."""
    from rich.text import Text

    styles = dict(_ROLE_STYLES)
    text = Text()
    if conversation.id:
        text.append(f"{conversation.id}  {conversation.source}\n", style="dim")
    if conversation.system is not None:
        text.append("system\n", style="bold magenta").append(_visible(conversation.system) + "\n")
    for message in conversation.messages:
        text.append(f"{message.role}\n", style=styles[message.role])
        text.append(_visible(message.content if message.content is not None else "(awaited)") + "\n")
    return text


def format_mask(conversation: Conversation, format_name: str, tokenizer: Path) -> tuple[Text, int, int]:
    """The conversation as its tokens decode, trained runs in green; with the number of trained tokens and of all.

    Raises `UsageError` for an unknown format, `TokenizerError` for a tokenizer that cannot be read.
    """
    from rich.text import Text

    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    runs = mask_runs(conversation, resolve_format(format_name, folder), TextTokenizer.load(tokenizer))
    text = Text()
    for run in runs:
        text.append(run.text, style="green" if run.trained else "dim")
    return text, sum(run.tokens for run in runs if run.trained), sum(run.tokens for run in runs)


def mask_runs(conversation: Conversation, chat_format: ChatFormat, tokenizer: TextTokenizer) -> list[MaskRun]:
    """The conversation as its tokens decode, cut where the mask changes."""
    encoded = encode_conversation(conversation, chat_format, tokenizer)
    runs = []
    for trained, run in groupby(zip(encoded.ids, encoded.mask, strict=True), key=lambda pair: pair[1]):
        ids = [token_id for token_id, _ in run]
        runs.append(MaskRun(_visible(tokenizer.decode(ids)), bool(trained), len(ids)))
    return runs


def _visible(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
