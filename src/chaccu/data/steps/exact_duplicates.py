"""Exact duplicates: conversations whose turns and system text are the same but for case and white space. The first one in the
input stays.

The same turns under another system text are another conversation: what is learned there is to answer so in that place.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import ClassVar

from chaccu.conversation import Conversation
from chaccu.data.outcome import Index, Step
from chaccu.data.records import words_by_turn


class ExactDuplicates(Step, frozen=True):
    """No settings."""

    name: ClassVar[str] = "exact_duplicates"

    def digest(self, conversation: Conversation) -> bytes:
        """128 bits of the normalised texts: at ten million conversations a false match has odds of about 1 in 10^25."""
        hashed = blake2b(digest_size=16)
        if conversation.system is not None:
            hashed.update(f"system\x1f{' '.join(conversation.system.casefold().split())}\x1e".encode())
        for message, words in zip(conversation.messages, words_by_turn(conversation), strict=True):
            hashed.update(f"{message.role}\x1f{' '.join(words)}\x1e".encode())
        return hashed.digest()

    def open_index(self) -> Index:
        return _SeenDigests()


class _SeenDigests:
    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def admit(self, digest: bytes) -> str | None:
        if digest in self._seen:
            return "exact duplicate"
        self._seen.add(digest)
        return None
