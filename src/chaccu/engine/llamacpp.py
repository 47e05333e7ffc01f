"""The llama.cpp engine: GGUF weights on a CPU or laptop, through xllamacpp.

Requests go to its server (`llama_server`) as token ids and come back as a stream, several at once over its slots. An adapter is
a server of its own over the same file: the weights are mapped into memory once, the cache is each one's own. In one server
llama.cpp would keep answers of other adapters waiting until all of one are done, and give the base what it has read through an
adapter. Embeddings are the mean of the last hidden states over an input's tokens, scaled to length 1.

Invariants: prompts are never tokenised here; at most `slots` requests are worked on, with adapters or without, the others wait
in order; leaving a stream frees its slot.

It ignores the chat template inside the GGUF.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec

from chaccu.engine.adapter_source import AdapterSource
from chaccu.engine.deltas import DeltaBuilder
from chaccu.engine.json_schemas import can_read_schemas, read_schema
from chaccu.engine.llama_server import EMBEDDED_TOKENS, LlamaServer, ServerSettings
from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import (
    LEAST_LOGPROB,
    Ability,
    EngineInfo,
    EngineOptions,
    GenerationDelta,
    GenerationRequest,
    TokenLogprob,
    WrongRequestError,
    check_inputs,
    room_for_answer,
)
from chaccu.engine.server_text import read_lines, tell_error
from chaccu.errors import EngineError

_DEFAULT_SLOTS = 4
_DEFAULT_CONTEXT_TOKENS = 4096
# Tokens less likely than this share of the likeliest are left out where nothing else is cut: beside it a float32 does not hold
# them, and a draw from the rest is a quarter faster.
_LEAST_SHARE = 2.0**-24
_MAX_AUTO_THREADS = 8
_GGUF_MAGIC = b"GGUF"
_DATA = b"data: "


class _LikelyToken(msgspec.Struct):
    bytes: list[int]
    logprob: float


class _TokenProbability(_LikelyToken):
    """Of llama.cpp's own distribution, before sampling. Of a character of several tokens it is the last one's."""

    top_logprobs: list[_LikelyToken] = []


class _Chunk(msgspec.Struct):
    """One event of llama.cpp's completion stream; `tokens_predicted` counts all so far, `stop` marks the last."""

    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: int = 0
    completion_probabilities: list[_TokenProbability] = []


class _Embedding(msgspec.Struct):
    embedding: list[float]


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


class LlamaCppEngine:
    """One GGUF model in llama.cpp's server, and a server for each adapter over the same file."""

    def __init__(self, server: LlamaServer, settings: ServerSettings, info: EngineInfo) -> None:
        self._server = server
        self._settings = settings
        self._info = info
        self._adapted: dict[str, LlamaServer] = {}
        self._slots = asyncio.Semaphore(info.slots)

    @classmethod
    def load(cls, source: ModelSource, options: EngineOptions) -> LlamaCppEngine:
        settings = ServerSettings(
            gguf=_check_gguf(source),
            threads=options.threads or _default_threads(),
            slots=options.slots or _DEFAULT_SLOTS,
            context_tokens=options.context_tokens or _DEFAULT_CONTEXT_TOKENS,
        )
        server = LlamaServer(settings)
        abilities: tuple[Ability, ...] = ("penalties", "logit_bias", "logprobs", "embeddings", "token_ids")
        if can_read_schemas():
            abilities += ("json_schema",)
        info = EngineInfo(
            engine="llamacpp",
            context_tokens=min(settings.context_tokens, server.trained_context()),
            slots=settings.slots,
            abilities=abilities,
        )
        return cls(server, settings, info)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def load_adapter(self, adapter: AdapterSource) -> None:
        if adapter.gguf is None:
            raise EngineError(
                f"{adapter.folder} holds no adapter.gguf, which llama.cpp needs.",
                remedy=f"chaccu weights adapter-gguf {adapter.folder} --gguf {self._settings.gguf} --out FOLDER",
            )
        self._adapted[adapter.name] = await asyncio.to_thread(LlamaServer, self._settings, adapter.gguf)

    async def unload_adapter(self, name: str) -> None:
        await self._adapted.pop(name).close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        limit = room_for_answer(request, self._info.context_tokens)
        stop_ids = frozenset(request.stop_ids)
        body = await asyncio.to_thread(_request_body, request, limit, self._info.context_tokens)
        # llama.cpp's own stop strings lose the text they held back when an answer ends at its limit.
        builder = DeltaBuilder(request)
        async with self._slots:
            events = _events(self._server_of(request.adapter), body)
            try:
                async for chunk in events:
                    tokens = chunk.tokens_predicted - builder.made
                    # It ends by itself only at the end tokens that the GGUF names; the format may name others.
                    if not stop_ids.isdisjoint(chunk.tokens):
                        yield builder.end("stop", tokens=tokens)
                        return
                    delta = builder.push(chunk.content, tokens=tokens, logprob=_logprob(chunk, request.top_logprobs))
                    if delta is not None:
                        yield delta
                        if delta.finish_reason is not None:
                            return
                    if chunk.stop:
                        yield builder.end("length" if chunk.stop_type == "limit" else "stop")
                        return
            finally:
                await events.aclose()
        raise EngineError("llama.cpp ended its stream without saying that the answer is complete.", remedy="ask again")

    async def embed(self, inputs: list[list[int]], adapter: str | None = None) -> list[list[float]]:
        check_inputs(inputs, min(self._info.context_tokens, EMBEDDED_TOKENS))
        # One by one: side by side in a batch, equal inputs would get slightly different vectors.
        return [await self._embed_one(ids, adapter) for ids in inputs]

    async def _embed_one(self, ids: list[int], adapter: str | None) -> list[float]:
        async with self._slots, self._server_of(adapter).post("/v1/embeddings", {"input": [ids]}) as response:
            (found,) = msgspec.json.decode(await response.read(), type=_Embeddings).data
        return found.embedding

    async def close(self) -> None:
        servers = [self._server, *self._adapted.values()]
        self._adapted.clear()
        await asyncio.gather(*(server.close() for server in servers))

    def _server_of(self, adapter: str | None) -> LlamaServer:
        return self._server if adapter is None else self._adapted[adapter]


async def _events(server: LlamaServer, body: dict[str, Any]) -> AsyncGenerator[_Chunk, None]:
    async with server.post("/completion", body) as response:
        async for line in read_lines(response.content.iter_any()):
            if line.startswith(_DATA):
                yield msgspec.json.decode(line[len(_DATA) :], type=_Chunk)
            elif line.startswith(b"error: "):
                raise EngineError(f"llama.cpp failed while generating: {tell_error(line[len(b'error: ') :])}")


def _request_body(request: GenerationRequest, limit: int, context_tokens: int) -> dict[str, Any]:
    """The body of a completion. Raises `WrongRequestError`."""
    body: dict[str, Any] = {
        "prompt": request.prompt_ids + request.reply_ids,
        "n_predict": limit,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": True,
        "logit_bias": _logit_bias(request),
        **_sampling(request, context_tokens),
        "seed": -1 if request.seed is None else request.seed % 2**32,
    }
    if request.top_logprobs is not None:
        body["n_probs"] = max(1, request.top_logprobs)
    if request.json_schema is not None:
        if request.reply_ids:
            raise WrongRequestError(
                "llamacpp cannot go on with an answer that keeps to a JSON schema.", parameter="response_format"
            )
        body["json_schema"] = read_schema(request.json_schema)
    return body


def _sampling(request: GenerationRequest, context_tokens: int) -> dict[str, Any]:
    """What llama.cpp samples by: only the steps that do something, for each goes over the whole vocabulary (262,144 tokens for
    Gemma), and a greedy token is the first of one instead of a draw.

    Temperature comes before the cuts, as in the other engines: top_p then cuts the tempered distribution.
    """
    penalties = (request.repetition_penalty, request.presence_penalty, request.frequency_penalty)
    steps = ["penalties"] if penalties != (1, 0, 0) else []
    top_k, min_p = request.top_k, request.min_p
    if request.temperature == 0:
        steps, top_k = [*steps, "top_k"], 1
    else:
        steps.append("temperature")
        if not top_k and not min_p:
            min_p = _LEAST_SHARE
            steps.append("min_p")
        steps += ["top_k"] if top_k else []
        steps += ["top_p"] if request.top_p < 1 else []
        steps += ["min_p"] if request.min_p else []
    return {
        "samplers": steps,
        "temperature": request.temperature,
        "top_k": top_k,
        "top_p": request.top_p,
        "min_p": min_p,
        "repeat_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repeat_last_n": context_tokens,
    }


def _logit_bias(request: GenerationRequest) -> list[tuple[int, float]]:
    """The request's biases, and what makes up for the frequency penalty of the prompt's tokens: llama.cpp counts these too."""
    bias = dict(request.logit_bias)
    if request.frequency_penalty:
        if request.repetition_penalty != 1:
            raise WrongRequestError(
                "llamacpp does not carry out frequency_penalty and repetition_penalty together.", parameter="frequency_penalty"
            )
        for token, count in Counter(request.prompt_ids).items():
            bias[token] = bias.get(token, 0.0) + count * request.frequency_penalty
    return list(bias.items())


def _logprob(chunk: _Chunk, top: int | None) -> TokenLogprob | None:
    if top is None or not chunk.completion_probabilities:
        return None
    (chosen,) = chunk.completion_probabilities
    likeliest = [(bytes(one.bytes), max(one.logprob, LEAST_LOGPROB)) for one in chosen.top_logprobs[:top]]
    return TokenLogprob(bytes(chosen.bytes), max(chosen.logprob, LEAST_LOGPROB), likeliest)


def _check_gguf(source: ModelSource) -> Path:
    path = source.gguf
    if path is None:
        raise EngineError(f"{source.spec} holds no GGUF file.", remedy="`chaccu weights convert` makes one")
    with path.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise EngineError(
            f"{path} is no GGUF file: it begins with {magic!r}, not {_GGUF_MAGIC!r}.", remedy="make or fetch it again"
        )
    return path


def _default_threads() -> int:
    """All cores this process may use, up to eight: generation is bound by memory, so more of them only compete."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(usable, _MAX_AUTO_THREADS))
