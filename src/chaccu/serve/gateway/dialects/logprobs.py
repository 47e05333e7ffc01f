"""Log-probabilities as OpenAI's API writes them, for chat completions and for raw ones.

A token may be a part of a character: its text then has the replacement character, and only its bytes are exact. Offsets are in
characters of the answer, from its beginning. It ignores where the numbers come from.
"""

from __future__ import annotations

from typing import Any

from chaccu.serve.link import TokenLogprob

_CONTINUES = range(0x80, 0xC0)  # bytes of UTF-8 that go on with a character


def write_chat_logprobs(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat completion's choice."""
    content = [
        {**_entry(one.token, one.logprob), "top_logprobs": [_entry(token, logprob) for token, logprob in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


class RawLogprobs:
    """The `logprobs` of one choice of a raw completion, in as many pieces as it comes; it keeps the place in the answer."""

    def __init__(self) -> None:
        self._begun_chars = 0

    def write(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        """The next tokens' `logprobs`."""
        return {
            "tokens": [_text(one.token) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{_text(token): logprob for token, logprob in reversed(one.top)} for one in logprobs],
            "text_offset": [self._place(one.token) for one in logprobs],
        }

    def _place(self, token: bytes) -> int:
        """Where the character stands that `token` begins with."""
        place = self._begun_chars
        self._begun_chars += sum(byte not in _CONTINUES for byte in token)
        return max(place - 1, 0) if token and token[0] in _CONTINUES else place


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(token), "logprob": logprob, "bytes": list(token)}


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
