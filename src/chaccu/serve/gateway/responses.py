"""How an answer is written: OpenAI's chat and completion objects, whole or as server-sent events.

Invariants: the fixed parts of an event are encoded once an answer, so each piece of text costs only its own encoding; a stream
ends with a finish reason, the usage when it was asked for, and `[DONE]`. It ignores where the text comes from.
"""

from __future__ import annotations

from typing import Any

import msgspec

from chaccu.serve.gateway.answer import AnswerPart, AnswerUsage
from chaccu.serve.gateway.errors import ApiError

_encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


class CompletionWriter:
    """Writes one answer of a chat completion, or of a raw completion when `chat` is false."""

    def __init__(self, *, answer_id: str, created_s: int, model: str, chat: bool, with_usage: bool) -> None:
        self._chat = chat
        self._with_usage = with_usage
        self._head = {"id": answer_id, "created": created_s, "model": model}
        self._stream_kind = "chat.completion.chunk" if chat else "text_completion"
        # Text stands between these two; everything else in the events of one answer is the same.
        mark = "\x00"
        before, _, after = self._event([self._choice({"content": mark} if chat else mark, None)], None).partition(_encode(mark))
        self._before, self._after = before, after

    def opening(self, first: AnswerPart) -> bytes:
        """The events before any text."""
        return self._event([self._choice({"role": "assistant", "content": ""}, None)], None) if self._chat else b""

    def texts(self, texts: list[str]) -> bytes:
        """One event a text."""
        return b"".join(self._before + _encode(text) + self._after for text in texts)

    def ending(self, last: AnswerPart, usage: AnswerUsage) -> bytes:
        """The events after all text."""
        end = self._event([self._choice({} if self._chat else "", last.finish_reason)], None)
        return end + (self._event([], _usage(usage)) if self._with_usage else b"") + DONE

    def failure(self, error: ApiError) -> bytes:
        """The event of an answer that breaks off."""
        return error_event(error.to_json())

    def whole(self, text: str, last: AnswerPart, usage: AnswerUsage) -> bytes:
        """The answer as one object."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": last.finish_reason, "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self._chat else "text_completion"
        return _encode({**self._head, "object": kind, "choices": [choice], "usage": _usage(usage)})

    def _choice(self, content: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta" if self._chat else "text": content, "logprobs": None, "finish_reason": finish_reason}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        fields = {**self._head, "object": self._stream_kind, "choices": choices}
        if self._with_usage:
            fields["usage"] = usage
        return b"data: " + _encode(fields) + b"\n\n"


def error_event(error_json: bytes) -> bytes:
    """An error inside a stream that has begun."""
    return b"data: " + error_json + b"\n\n"


def _usage(usage: AnswerUsage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
