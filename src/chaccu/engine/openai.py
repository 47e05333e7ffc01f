"""The openai engine: any OpenAI-compatible server, for one that the gateway cannot reach, with the worker beside it.

Invariants: the server gets the ids or the text that our renderer made, through `/completions`; its key comes by the
environment (`CHACCU_ENGINE_KEY`) and is never told. What a server cannot be held to (penalties, log-probabilities, schemas)
is not offered.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator

from chaccu.conversation import TextTokenizer
from chaccu.engine.completions import CompletionsServer, check_url
from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import EngineInfo, EngineOptions, GenerationDelta, GenerationRequest
from chaccu.engine.scripted import build_byte_tokenizer
from chaccu.errors import EngineError

KEY_VARIABLE = "CHACCU_ENGINE_KEY"
_DEFAULT_SLOTS = 16


class OpenAIEngine:
    """One model of one server."""

    def __init__(self, server: CompletionsServer, info: EngineInfo) -> None:
        self._server = server
        self._info = info
        self._slots = asyncio.Semaphore(info.slots)

    @classmethod
    def load(cls, source: ModelSource, options: EngineOptions) -> OpenAIEngine:
        url = check_url(source.url)
        tokenizer = build_byte_tokenizer() if source.folder is None else TextTokenizer.load(source.folder)
        key = os.environ.get(KEY_VARIABLE, "")
        server = CompletionsServer(url, source.name, key, tokenizer, counts_tokens=source.folder is not None, who="the server")
        server.meet()
        context_tokens = min(options.context_tokens or server.context_tokens, server.context_tokens)
        slots = options.slots or _DEFAULT_SLOTS
        return cls(server, EngineInfo(engine="openai", context_tokens=context_tokens, slots=slots, device="remote"))

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        if not request.prompt_ids:
            raise EngineError("the prompt is empty (0 tokens).", remedy="send at least one token")
        async with self._slots:
            deltas = self._server.generate(request, self._info.context_tokens)
            try:
                async for delta in deltas:
                    yield delta
            finally:
                await deltas.aclose()

    async def embed(self, inputs: list[list[int]]) -> list[list[float]]:
        raise EngineError("the engine openai makes no embeddings.", remedy="name the server as an upstream of the gateway")

    async def close(self) -> None:
        await self._server.close()
