"""What the servers behind engines say: lines of a stream, and errors in words that clients may see.

Invariant: words are one line of moderate length without paths of the server's files.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import msgspec

_MAX_WORDS_CHARS = 300
# A path of two parts or more, or one of Windows; what follows a scheme or a digit is an address or a fraction.
_PATH = re.compile(r"(?<![\w:/.<])(?:~|[A-Za-z]:\\|\.{0,2}/)[^\s'\"`,;:)\]}]*[/\\][^\s'\"`,;:)\]}]*")


async def read_lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Whole lines of a byte stream, however long (aiohttp's own reader refuses long ones)."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def tell_error(body: bytes) -> str:
    """A server's own words for what is wrong, in one line without its paths."""
    try:
        fields = msgspec.json.decode(body)
    except msgspec.DecodeError:
        fields = body.decode("utf-8", "replace")
    for name in ("error", "message", "detail"):
        if isinstance(fields, dict) and fields.get(name):
            fields = fields[name]
    return hide_paths(str(fields))


def hide_paths(text: str) -> str:
    """`text` in one line of moderate length, with … for paths of files."""
    words = " ".join(_PATH.sub("…", text).split())
    return words if len(words) <= _MAX_WORDS_CHARS else words[: _MAX_WORDS_CHARS - 1] + "…"
