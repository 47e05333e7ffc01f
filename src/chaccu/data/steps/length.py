"""Length: blank questions and answers, and conversations too short to teach anything."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from chaccu.conversation import Conversation
from chaccu.data.outcome import Changed, Drop, Outcome, Step, filter_rounds
from chaccu.data.records import count_chars
from chaccu.data.rounds import Round

# White space that str.strip leaves: zero-width space, joiners, word joiner, byte order mark.
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
Count = Annotated[int, msgspec.Meta(ge=0)]


class Length(Step, frozen=True):
    """Rounds with a blank question or answer go; then conversations under `min_chars` or `min_answer_chars` in all."""

    name: ClassVar[str] = "length"

    min_chars: Count = 0
    min_answer_chars: Count = 1

    def __call__(self, conversation: Conversation) -> Outcome:
        outcome = filter_rounds(conversation, _blank)
        if isinstance(outcome, Drop):
            return outcome
        left = outcome.conversations[0] if isinstance(outcome, Changed) else outcome
        answer_chars = sum(len(message.content or "") for message in left.messages if message.role == "assistant")
        if count_chars(left) < self.min_chars or answer_chars < self.min_answer_chars:
            return Drop("too short")
        return outcome


def _blank(turns: Round) -> str | None:
    for message in turns:
        if not (message.content or "").strip().strip(_INVISIBLE).strip():
            return "blank question" if message.role == "user" else "blank answer"
    return None
