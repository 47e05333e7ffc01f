"""Repetition and gibberish in answers: rounds go whose answer says one thing over and over, or is no readable text.

Repetition is measured by how far DEFLATE compresses the answer (a loop compresses to a few hundredths, prose to a third or
a half); gibberish by the share of characters that are control, private use or replacement characters.
"""

from __future__ import annotations

import re
import zlib
from typing import Annotated, ClassVar

import msgspec

from chaccu.conversation import Conversation
from chaccu.data.outcome import Outcome, Step, filter_rounds
from chaccu.data.rounds import Round

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff]")


class Repetition(Step, frozen=True):
    """`min_compressed_share`: compressed size over size below which an answer of at least `from_chars` is repetition;
    `max_unreadable_share`: share of unreadable characters above which it is gibberish."""

    name: ClassVar[str] = "repetition"

    min_compressed_share: Share = 0.05
    from_chars: Annotated[int, msgspec.Meta(ge=1)] = 400
    max_unreadable_share: Share = 0.05

    def __call__(self, conversation: Conversation) -> Outcome:
        return filter_rounds(conversation, self._judge)

    def _judge(self, turns: Round) -> str | None:
        for message in turns:
            text = message.content or ""
            if message.role != "assistant" or not text:
                continue
            if _UNREADABLE.search(text) and len(_UNREADABLE.findall(text)) > self.max_unreadable_share * len(text):
                return "gibberish"
            if len(text) >= self.from_chars:
                plain = text.encode("utf-8")
                if len(zlib.compress(plain, 1)) < self.min_compressed_share * len(plain):
                    return "repetition"
        return None
