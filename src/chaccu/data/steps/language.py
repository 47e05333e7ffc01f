"""Language: keep or skip conversations by their main language. Its defaults keep all."""

from __future__ import annotations

from typing import ClassVar, Literal

from chaccu.conversation import Conversation
from chaccu.data.language import UNKNOWN, detect_language
from chaccu.data.outcome import Drop, Outcome, Step


class Language(Step, frozen=True):
    """`keep`: ISO 639 codes to keep (empty: all); `skip`: codes to drop; `unknown`: what becomes of text of no certain
    language."""

    name: ClassVar[str] = "language"

    keep: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    unknown: Literal["keep", "drop"] = "keep"

    def __call__(self, conversation: Conversation) -> Outcome:
        if not self.keep and not self.skip and self.unknown == "keep":
            return conversation
        language = detect_language(conversation)
        if language == UNKNOWN:
            return conversation if self.unknown == "keep" else Drop("language unknown")
        if language in self.skip or (self.keep and language not in self.keep):
            return Drop(f"language {language}")
        return conversation
