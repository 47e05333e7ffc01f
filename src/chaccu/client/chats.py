"""What is asked of a model and what comes back, and both in the form of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from chaccu.conversation import Conversation, Message

Messages: TypeAlias = Conversation | Sequence[Message] | Sequence[Mapping[str, Any]]
"""What a model is asked: a conversation, its turns alone, or messages as the OpenAI API has them. Pending ones are left out."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is sampled; None leaves a value to the server. `max_tokens` counts new tokens; temperature 0 is greedy."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Usage(msgspec.Struct, frozen=True):
    """Tokens read and written for one answer, as the server counts them."""

    prompt_tokens: int
    completion_tokens: int


class ChatDelta(msgspec.Struct, frozen=True):
    """A piece of an answer. The last alone has a `finish_reason` ("stop", "length", …) and, if the server tells them, `usage`
    and `model`, the name that it answered under."""

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None
    model: str | None = None


class Completion(msgspec.Struct, frozen=True):
    """A whole answer. `model`: the name that the server answered under, if it tells it."""

    text: str
    finish_reason: str
    usage: Usage | None
    model: str | None = None


def write_request(model: str, messages: Messages, sampling: Sampling) -> dict[str, Any]:
    turns: list[Mapping[str, Any]] = []
    if isinstance(messages, Conversation) and messages.system:
        turns.append({"role": "system", "content": messages.system})
    for turn in messages.messages if isinstance(messages, Conversation) else messages:
        written = {"role": turn.role, "content": turn.content} if isinstance(turn, Message) else turn
        if written.get("content") is not None:
            turns.append(written)
    wanted: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    request = {name: value for name, value in wanted.items() if value is not None}
    if sampling.stop:
        request["stop"] = list(sampling.stop)
    return {"model": model, "messages": turns, "stream": True, "stream_options": {"include_usage": True}, **request}


def read_chunk(chunk: Any) -> tuple[str, str | None, Usage | None]:
    """Text, finish reason and usage of one chunk, which the library does not check for its form."""
    choices = chunk.choices
    usage = chunk.usage and Usage(int(chunk.usage.prompt_tokens), int(chunk.usage.completion_tokens))
    if not choices:
        return "", None, usage
    # What a model says when it declines an answer of a given form stands in a field of its own.
    text = choices[0].delta.content or choices[0].delta.refusal or ""
    if not isinstance(text, str):
        raise TypeError(f"a piece of text is {text!r:.80}")
    return text, choices[0].finish_reason, usage


def read_name(chunk: Any) -> str | None:
    return chunk.model if isinstance(chunk.model, str) and chunk.model else None
