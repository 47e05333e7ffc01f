"""The llama.cpp engine: GGUF weights on a CPU or laptop, through xllamacpp.

Its server runs inside this process on a loopback port of its own with a random key; requests go to it as token ids and come
back as a stream, several at once over its slots. Embeddings are the mean of the last hidden states over an input's tokens,
scaled to length 1.

Invariants: prompts are never tokenised here; at most `slots` requests are in
it, the others wait in order; leaving a stream closes its connection, which frees the slot.

It ignores the chat template inside the GGUF.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.engine.deltas import DeltaBuilder
from chaccu.engine.json_schemas import can_read_schemas, read_schema
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
from chaccu.errors import EngineError, MissingDependencyError

if TYPE_CHECKING:
    import aiohttp

_DEFAULT_SLOTS = 4
_DEFAULT_CONTEXT_TOKENS = 4096
# Tokens less likely than this share of the likeliest are left out where nothing else is cut: beside it a float32 does not hold
# them, and a draw from the rest is a quarter faster.
_LEAST_SHARE = 2.0**-24
_MAX_AUTO_THREADS = 8
_EMBEDDED_TOKENS = 512  # of one input at most: llama.cpp's own size of a batch
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
    """One GGUF model in llama.cpp's server, spoken to over loopback."""

    def __init__(self, server: Any, info: EngineInfo, key: str) -> None:
        self._server = server
        self._url = server.listening_address
        self._info = info
        self._key = key
        self._slots = asyncio.Semaphore(info.slots)
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def load(cls, source: ModelSource, options: EngineOptions) -> LlamaCppEngine:
        # OpenMP's threads that spin for long starve everything else on shared cores; those that do not spin at all lose a tenth
        # of the speed in waking. The library reads this once, when it is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        try:
            import xllamacpp
        except ImportError as error:
            raise MissingDependencyError("xllamacpp", extra="cpu-engine", needed_for="the engine llamacpp") from error
        path = _check_gguf(source)
        slots = options.slots or _DEFAULT_SLOTS
        context_tokens = options.context_tokens or _DEFAULT_CONTEXT_TOKENS
        key = secrets.token_urlsafe(24)
        params = _build_params(path, options.threads or _default_threads(), slots, context_tokens, key)
        try:
            server = xllamacpp.Server(params)
        except Exception as error:  # the binding raises whatever llama.cpp's loader met
            raise EngineError(
                f"llama.cpp cannot load {path}: {error}.", remedy="check the file; make it again if it is damaged"
            ) from error
        context_tokens = min(context_tokens, _trained_context(server.listening_address, key))
        abilities: tuple[Ability, ...] = ("penalties", "logit_bias", "logprobs", "embeddings")
        if can_read_schemas():
            abilities += ("json_schema",)
        info = EngineInfo(engine="llamacpp", context_tokens=context_tokens, slots=slots, abilities=abilities)
        return cls(server, info, key)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        limit = room_for_answer(request, self._info.context_tokens)
        stop_ids = frozenset(request.stop_ids)
        body = await asyncio.to_thread(_request_body, request, limit, self._info.context_tokens)
        # llama.cpp's own stop strings lose the text they held back when an answer ends at its limit.
        builder = DeltaBuilder(request)
        async with self._slots:
            events = self._events(body)
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

    async def embed(self, inputs: list[list[int]]) -> list[list[float]]:
        check_inputs(inputs, min(self._info.context_tokens, _EMBEDDED_TOKENS))
        # One by one: side by side in a batch, equal inputs would get slightly different vectors.
        return [await self._embed_one(ids) for ids in inputs]

    async def _embed_one(self, ids: list[int]) -> list[float]:
        async with self._slots, self._post("/v1/embeddings", {"input": [ids]}) as response:
            (found,) = msgspec.json.decode(await response.read(), type=_Embeddings).data
        return found.embedding

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        # The server joins its threads when it is freed, which may take as long as one batch.
        server, self._server = self._server, None
        await asyncio.to_thread(_free, [server])

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[_Chunk, None]:
        async with self._post("/completion", body) as response:
            async for line in read_lines(response.content.iter_any()):
                if line.startswith(_DATA):
                    yield msgspec.json.decode(line[len(_DATA) :], type=_Chunk)
                elif line.startswith(b"error: "):
                    raise EngineError(f"llama.cpp failed while generating: {tell_error(line[len(b'error: ') :])}")

    @contextlib.asynccontextmanager
    async def _post(self, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The server's response, which is none of an error. Raises `EngineError`."""
        import aiohttp

        if self._session is None:
            # A kept-alive connection of this server can break after a stream, and closing one is what cancels its work.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Authorization": f"Bearer {self._key}"},
                trust_env=False,
            )
        try:
            async with self._session.post(self._url + path, json=body) as response:
                if response.status != 200:
                    raise EngineError(f"llama.cpp refused the request: {tell_error(await response.read())}")
                yield response
        except aiohttp.ClientError as error:
            raise EngineError(f"the connection to llama.cpp broke: {error}.", remedy="ask again") from error


def _build_params(path: Path, threads: int, slots: int, context_tokens: int, key: str) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = slots
    params.n_ctx = context_tokens * slots  # llama.cpp divides its context among the slots
    params.ctx_shift = False
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [key]
    params.n_threads_http = slots + 2  # one a running stream, and some to refuse with
    params.verbosity = -1
    params.ui = False
    # Texts too: it still answers, and gives vectors beside. Their mean is made inside one batch of the processor's.
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.n_ubatch = _EMBEDDED_TOKENS
    params.endpoint_slots = False
    params.endpoint_props = False
    return params


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


def _trained_context(url: str, key: str) -> int:
    """The longest context the weights were trained for, in tokens, as the loaded server tells it."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        models = msgspec.json.decode(connection.getresponse().read())
    finally:
        connection.close()
    return int(models["data"][0]["meta"]["n_ctx_train"])


def _default_threads() -> int:
    """All cores this process may use, up to eight: generation is bound by memory, so more of them only compete."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(usable, _MAX_AUTO_THREADS))


def _free(owners: list[Any]) -> None:
    owners.clear()
