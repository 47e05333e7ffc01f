"""The language of a conversation, by Google's CLD2 (no model file, no network).

`UNKNOWN` stands for text too short, too mixed or too much code to tell. The first characters are looked at, fenced code
left out.
"""

from __future__ import annotations

import re
from functools import lru_cache

from chaccu.conversation import Conversation

UNKNOWN = "unknown"
SAMPLE_CHARS = 2000
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
# CLD2 refuses text with control characters and with code points that are no characters.
_UNREADABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\U0001fffe-\U0001ffff\U0002fffe-\U0010ffff]")


def detect_language(conversation: Conversation) -> str:
    """ISO 639 code of the conversation's main language, or `UNKNOWN`."""
    pieces: list[str] = []
    length = 0
    for message in conversation.messages:
        if length >= SAMPLE_CHARS:
            break
        pieces.append((message.content or "")[: SAMPLE_CHARS - length])
        length += len(pieces[-1])
    return _detect("\n".join(pieces))


@lru_cache(maxsize=8)
def _detect(sample: str) -> str:
    import pycld2

    text = _UNREADABLE.sub(" ", _FENCED.sub(" ", sample))
    try:
        reliable, _, ((_, code, _, _), *_) = pycld2.detect(text.encode("utf-8"))
    except pycld2.error:
        return UNKNOWN
    return code if reliable and code != "un" else UNKNOWN
