"""The types that the pieces of this room hand to one another, and the reader of what the room writes.

Invariants: a `Draft` keeps roles and texts as the dump gives them (a text that is no text is None); only the `roles` step
makes a `Conversation` of it. `chars` counts the characters of all turns, the measure of the ledger's before and after.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import msgspec

from chaccu.artifact import storage_errors
from chaccu.conversation import Conversation, parse_conversation
from chaccu.errors import ConversationError, DataError, StorageError

_PART = re.compile(r"_\d+\Z")


class RawRecord(msgspec.Struct, frozen=True):
    """One record's bytes, its number in its file (from 1), and the byte offsets `[start, end)` it was read from."""

    number: int
    payload: bytes
    start: int
    end: int


class Turn(msgspec.Struct, frozen=True):
    """One turn as found. `role` is whatever the dump calls it; `text` is None where the dump has something that is no text."""

    role: str
    text: str | None


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A record as a reader understood it; roles unknown, order unchecked."""

    id: str
    source: str
    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def chars(self) -> int:
        return sum(len(turn.text) for turn in self.turns if turn.text is not None)


def source_of(record_id: str) -> str:
    """The conversation that a record is a part of: its id without the part number that ShareGPT dumps put last (`_0`, `_1`,
    …)."""
    return _PART.sub("", record_id)


def qualified_source(origin: str, source: str) -> str:
    """A source conversation's name that tells dumps apart: `origin#source`."""
    return f"{origin}#{source}"


def bare_source(source: str) -> str:
    """The part of a qualified source that names the conversation: equal for the same conversation found in two dumps."""
    return source.rpartition("#")[2]


@lru_cache(maxsize=1)
def words_by_turn(conversation: Conversation) -> tuple[list[str], ...]:
    """Each turn's words between white space, without case; the steps that compare conversations ask one after another."""
    return tuple((message.content or "").casefold().split() for message in conversation.messages)


def count_chars(conversation: Conversation) -> int:
    """Characters of all turns."""
    return sum(len(message.content or "") for message in conversation.messages)


def list_files(path: Path) -> list[Path]:
    """The JSONL files of a dataset folder, training first, or the one file that `path` is. Raises `StorageError` for a folder
    without any."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise StorageError(f"{path} holds no *.jsonl.", remedy="name a folder that chaccu data clean wrote, or a file")
    return files


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Conversations of a JSONL file in Chaccu's own form, one at a time.

    Raises `StorageError` when the file cannot be read, `DataError` naming the line that is no conversation.
    """
    with storage_errors(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield parse_conversation(line)
            except ConversationError as error:
                raise DataError(
                    f"{path}, line {number}: {error.message}", remedy="clean the file first: chaccu data clean FILE --out DIR"
                ) from error
