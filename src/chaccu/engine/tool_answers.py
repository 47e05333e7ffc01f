"""`answer_with_tools`: an answer in which a server may call functions, through its `/chat/completions`.

Invariants: messages and functions go to the server as they came, and into its own chat template, for no format of ours has a
place for them; stop strings are looked for here, as in all answers. It ignores reasoning that comes apart from the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from chaccu.conversation import ToolCallDelta
from chaccu.engine.completions import CompletionsServer, ServerEvent
from chaccu.engine.deltas import DeltaBuilder
from chaccu.engine.protocol import GenerationDelta, GenerationRequest, Usage
from chaccu.errors import EngineError

_REASONS = frozenset({"stop", "length", "tool_calls"})


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Said(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    delta: _Said | None = None
    finish_reason: str | None = None


class _Chunk(ServerEvent):
    choices: list[_Choice] = msgspec.field(default_factory=list)


async def answer_with_tools(server: CompletionsServer, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
    """The answer to `request`, which has a `chat`. Raises as `CompletionsServer.generate` does, and `WrongRequestError` for
    what the server does not take.
    """
    builder = DeltaBuilder(request)
    reason: str | None = None
    prompt_tokens = completion_tokens = 0
    called = False
    events = server.stream("/chat/completions", _body(server, request), _Chunk, blames="tools")
    async with contextlib.aclosing(events) as chunks:
        async for chunk in chunks:
            if chunk.usage is not None:
                prompt_tokens, completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            choice = chunk.choices[0] if chunk.choices else _Choice()
            reason = choice.finish_reason or reason
            said = choice.delta or _Said()
            delta = builder.push(said.content) if said.content else None
            if delta is not None:
                yield _count_prompt(delta, prompt_tokens)
                if delta.finish_reason is not None:
                    return
            if said.tool_calls:
                called = True
                yield builder.push_calls([_read_call(call) for call in said.tool_calls])
    if reason not in _REASONS:
        why = "without saying that the answer is complete" if reason is None else f"with {reason!r}"
        raise EngineError(f"{server.who} ended its answer {why}.", remedy="ask again")
    missing = max(0, completion_tokens - builder.made)
    # Of a call that was asked for by its name, some servers say that the answer stopped.
    last = builder.end("length" if reason == "length" else "tool_calls" if called else "stop", tokens=missing)
    yield _count_prompt(last, prompt_tokens)


def _body(server: CompletionsServer, request: GenerationRequest) -> dict[str, Any]:
    assert request.chat is not None
    limit = {} if request.max_tokens is None else {"max_tokens": request.max_tokens}
    return {**server.settings(request), **limit, **request.chat.to_openai()}


def _read_call(call: _Call) -> ToolCallDelta:
    function = call.function or _Function()
    return ToolCallDelta(call.index, call.id or "", function.name or "", function.arguments or "")


def _count_prompt(delta: GenerationDelta, prompt_tokens: int) -> GenerationDelta:
    """Only the server knows what its template makes of the messages."""
    if delta.usage is None:
        return delta
    return msgspec.structs.replace(delta, usage=Usage(prompt_tokens, delta.usage.completion_tokens))
