"""`ServerEngine`: what the engines have in common that another program's `/completions` answers for.

Invariant: no more requests at once go to the server than the engine has slots. It ignores who started the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from chaccu.engine.completions import CompletionsServer
from chaccu.engine.protocol import Ability, EngineInfo, EngineOptions, GenerationDelta, GenerationRequest
from chaccu.engine.tool_answers import answer_with_tools
from chaccu.errors import EngineError


class ServerEngine:
    """An engine over `server`, which has been met. `no_embeddings`: what to do instead of asking it for vectors."""

    no_embeddings = "serve the model with another engine for them"

    def __init__(self, server: CompletionsServer, info: EngineInfo) -> None:
        self._server = server
        self._info = info
        self._slots = asyncio.Semaphore(info.slots)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        server = self._server
        if request.chat is None:
            answer = server.generate(request, self._info.context_tokens)
        else:
            answer = answer_with_tools(server, request)
        async with self._slots, contextlib.aclosing(answer) as deltas:
            async for delta in deltas:
                yield delta

    async def embed(self, inputs: list[list[int]], adapter: str | None = None) -> list[list[float]]:
        raise EngineError(f"the engine {self._info.engine} makes no embeddings.", remedy=self.no_embeddings)

    async def close(self) -> None:
        await self._server.close()


def describe_server(
    server: CompletionsServer, options: EngineOptions, *, engine: str, default_slots: int, device: str
) -> EngineInfo:
    """What an engine over `server` offers: the server's context, or less where that is asked for."""
    context_tokens = min(options.context_tokens or server.context_tokens, server.context_tokens)
    can: dict[Ability, bool] = {"tools": server.takes_tools, "token_ids": server.takes_ids}
    return EngineInfo(
        engine=engine,
        context_tokens=context_tokens,
        slots=options.slots or default_slots,
        device=device,
        abilities=tuple(name for name, has in can.items() if has),
    )
