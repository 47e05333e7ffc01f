"""How an answer is written: OpenAI's chat and completion objects, whole or as server-sent events.

Invariants: the fixed parts of an event are encoded once an answer, so each piece of text costs only its own encoding; a stream
ends with a finish reason, the usage when it was asked for, and `[DONE]`. It ignores where the text comes from.
"""

from __future__ import annotations

from typing import Any

import msgspec

from chaccu.conversation import ToolCallDelta
from chaccu.serve.gateway.dialects.logprobs import RawLogprobs, write_chat_logprobs
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.workers.answer import AnswerPart, AnswerUsage
from chaccu.serve.gateway.workers.choices import WholeAnswer
from chaccu.serve.link import TokenLogprob

_encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
# In a usage's `prompt_tokens_details`: how many of the prompt's tokens are of the text that the answer goes on from.
CONTINUED_TOKENS = "continued_tokens"


class CompletionWriter:
    """Writes the `n` choices of a chat completion, or of a raw completion when `chat` is false. `goes_on`: behind a text that
    the request has begun.
    """

    def __init__(
        self,
        *,
        answer_id: str,
        created_s: int,
        model: str,
        chat: bool,
        with_usage: bool,
        n: int = 1,
        goes_on: bool = False,
    ) -> None:
        self._n = n
        self._goes_on = goes_on
        self._raw_logprobs = [RawLogprobs() for _ in range(n)]
        self._chat = chat
        self._with_usage = with_usage
        self._head = {"id": answer_id, "created": created_s, "model": model}
        self._stream_kind = "chat.completion.chunk" if chat else "text_completion"
        self._around = [self._around_text(index) for index in range(n)]

    def opening(self, first: AnswerPart) -> bytes:
        """The events before any text."""
        if not self._chat:
            return b""
        begun = {"role": "assistant", "content": ""}
        return b"".join(self._event([self._choice(index, begun, None)], None) for index in range(self._n))

    def texts(self, part: AnswerPart) -> bytes:
        """One event a text, or one for texts with log-probabilities; one for calls, and one for the end of a choice."""
        if part.logprobs:
            text = "".join(part.texts)
            choice = self._choice(part.index, {"content": text} if self._chat else text, None)
            events = self._event([{**choice, "logprobs": self._logprobs(part.index, part.logprobs)}], None)
        else:
            before, after = self._around[part.index]
            events = b"".join(before + _encode(text) + after for text in part.texts)
        if part.tool_calls:
            called = {"tool_calls": [_write_call(delta) for delta in part.tool_calls]}
            events += self._event([self._choice(part.index, called, None)], None)
        return events if part.finish_reason is None else events + self._end(part)

    def ending(self, last: AnswerPart, usage: AnswerUsage) -> bytes:
        """The events after all text."""
        return self._end(last) + (self._event([], self._usage(usage)) if self._with_usage else b"") + DONE

    def failure(self, error: ApiError) -> bytes:
        """The event of an answer that breaks off."""
        return error_event(error.to_json())

    def whole(self, choices: list[WholeAnswer], usage: AnswerUsage) -> bytes:
        """The answer as one object."""
        kind = "chat.completion" if self._chat else "text_completion"
        written = [self._whole_choice(choice) for choice in choices]
        return _encode({**self._head, "object": kind, "choices": written, "usage": self._usage(usage)})

    def _whole_choice(self, answer: WholeAnswer) -> dict[str, Any]:
        index, told = answer.last.index, answer.logprobs
        logprobs = self._logprobs(index, told) if told else None
        choice = {"index": index, "finish_reason": answer.last.finish_reason, "logprobs": logprobs}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
            if answer.called:
                calls = [call.to_openai() for call in answer.tool_calls]
                message |= {"content": answer.text or None, "tool_calls": calls}
            return {**choice, "message": message}
        return {**choice, "text": answer.text}

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return write_chat_logprobs(logprobs) if self._chat else self._raw_logprobs[index].write(logprobs)

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after a text in its event; everything else in the events of one choice is the same."""
        mark = "\x00"
        event = self._event([self._choice(index, {"content": mark} if self._chat else mark, None)], None)
        before, _, after = event.partition(_encode(mark))
        return before, after

    def _end(self, last: AnswerPart) -> bytes:
        return self._event([self._choice(last.index, {} if self._chat else "", last.finish_reason)], None)

    def _choice(self, index: int, content: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta" if self._chat else "text": content, "logprobs": None, "finish_reason": finish_reason}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        fields = {**self._head, "object": self._stream_kind, "choices": choices}
        if self._with_usage:
            fields["usage"] = usage
        return b"data: " + _encode(fields) + b"\n\n"

    def _usage(self, usage: AnswerUsage) -> dict[str, Any]:
        told: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        # Other servers count the begun text with the prompt: a gateway before this one has to know which it is.
        return {**told, "prompt_tokens_details": {CONTINUED_TOKENS: 0}} if self._goes_on else told


def _write_call(delta: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.arguments}
    if not delta.name:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, **function}}


def error_event(error_json: bytes) -> bytes:
    """An error inside a stream that has begun."""
    return b"data: " + error_json + b"\n\n"
