"""`CompletionsServer`: another program's OpenAI-compatible `/completions`, asked for answers as an engine is.

Prompts go as token ids where the server takes them, which it is asked once at the start; else as the text that they spell. So
messages are never put into a chat template of the server's, but for those with tools (`tool_answers`). Invariants: stop strings
are looked for here, never there, and no part of one is sent; leaving a stream closes its connection, which ends the server's
work; what a server says in an error is told without its paths. It ignores who started the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import msgspec

from chaccu.conversation import TextTokenizer
from chaccu.engine.deltas import DeltaBuilder
from chaccu.engine.protocol import (
    EngineLostError,
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    Usage,
    WrongRequestError,
    check_prompt,
    room_for_answer,
)
from chaccu.engine.server_text import read_lines, tell_error
from chaccu.errors import EngineError, UsageError

if TYPE_CHECKING:
    import aiohttp

DEFAULT_CONTEXT_TOKENS = 4096
_CONNECT_S = 10.0
_ASK_S = 60.0
_REFUSED = frozenset({400, 422})
_MAX_STOPS = 4  # that OpenAI's API allows
_NO_TOOL = {"name": "wait", "description": "Waits.", "parameters": {"type": "object", "properties": {}}}
_PROBE = "One two three four five six seven"
# What servers of these names take beside OpenAI's fields: all of our sampling, which they would else fill with defaults.
_SETTINGS = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": -1, "min_p": 0.0, "repeat_penalty": 1.0},
}


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ServerEvent(msgspec.Struct):
    """One event of a stream, or a whole answer: what all kinds have."""

    usage: _Counts | None = None
    error: Any = None


class _Chunk(ServerEvent):
    choices: list[_Choice] = []


class _Sizes(msgspec.Struct):
    n_ctx: int | None = None
    n_ctx_train: int | None = None


class _Model(msgspec.Struct):
    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    parent: str | None = None
    meta: _Sizes | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


Event = TypeVar("Event", bound=ServerEvent)


class CompletionsServer:
    """`url` ends before `/completions`; `model` is the server's name for it; `key` is sent with each request.

    `tokenizer` spells prompts for a server that takes no ids. `counts_tokens`: whether it is the model's own.
    """

    def __init__(self, url: str, model: str, key: str, tokenizer: TextTokenizer, *, counts_tokens: bool, who: str) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._key = key
        self._tokenizer = tokenizer
        self._counts_tokens = counts_tokens
        self.who = who
        self._kind = ""
        self._takes_ids = self._takes_tools = False
        self._session: aiohttp.ClientSession | None = None
        self.context_tokens = DEFAULT_CONTEXT_TOKENS
        # Names of what the server lists as adapters of the model.
        self.adapters: tuple[str, ...] = ()

    @property
    def takes_ids(self) -> bool:
        return self._takes_ids

    @property
    def takes_tools(self) -> bool:
        """Whether it took functions that may be called, when it was asked."""
        return self._takes_tools

    def meet(self) -> None:
        """Learn what the server is and takes. Raises `EngineError` when it is not there, refuses, or lacks the model."""
        asyncio.run(self._meet())

    async def _meet(self) -> None:
        try:
            await self._find_model()
            if self._counts_tokens:
                self._takes_ids = await self._probe_ids()
            self._takes_tools = await self._probe_tools()
        finally:
            await self.close()

    async def _find_model(self) -> None:
        status, body = await self._ask("GET", "/models", None)
        if status == 404:  # not every server lists its models
            return
        if status != 200:
            raise self._cannot_serve(f"answers with status {status}: {tell_error(body)}")
        try:
            models = msgspec.json.decode(body, type=_Models).data
        except msgspec.DecodeError as error:
            raise self._cannot_serve("does not list models as OpenAI's API does") from error
        found = next((model for model in models if model.id == self._model), None)
        if found is None:
            names = ", ".join(sorted(model.id for model in models)) or "none"
            raise self._cannot_serve(f"has no model {self._model!r}; it serves: {names}", "--name NAME, as the server has it")
        self._kind = found.owned_by if found.owned_by in _SETTINGS else ""
        self.adapters = tuple(model.id for model in models if model.parent == self._model)
        sizes = found.meta or _Sizes()
        self.context_tokens = found.max_model_len or sizes.n_ctx or sizes.n_ctx_train or DEFAULT_CONTEXT_TOKENS

    async def _probe_ids(self) -> bool:
        """Whether a prompt of ids is read as these ids."""
        ids = self._tokenizer.encode_texts([_PROBE], first=[False])[0]
        probe = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0}
        status, body = await self._ask("POST", "/completions", probe)
        if status in (401, 403, 404):
            raise self._cannot_serve(f"answers with status {status}: {tell_error(body)}")
        if status != 200:
            return False
        with contextlib.suppress(msgspec.DecodeError):
            usage = msgspec.json.decode(body, type=_Chunk).usage
            return usage is not None and usage.prompt_tokens == len(ids)
        return False

    async def _probe_tools(self) -> bool:
        """Whether a chat with a function is answered."""
        messages, tools = [{"role": "user", "content": _PROBE}], [{"type": "function", "function": _NO_TOOL}]
        probe = {"model": self._model, "messages": messages, "tools": tools, "max_tokens": 1, "temperature": 0}
        status, _ = await self._ask("POST", "/chat/completions", probe)
        return status == 200

    async def generate(self, request: GenerationRequest, context_tokens: int) -> AsyncGenerator[GenerationDelta, None]:
        """The answer to `request`. Raises `EngineLostError` when the server is gone, `EngineError` when it refuses or fails."""
        builder = DeltaBuilder(request)
        reason: FinishReason | None = None
        counts: _Counts | None = None
        async with contextlib.aclosing(self.stream("/completions", self._body(request, context_tokens), _Chunk)) as chunks:
            async for chunk in chunks:
                counts = chunk.usage or counts
                choice = chunk.choices[0] if chunk.choices else _Choice()
                if choice.finish_reason is not None:
                    reason = self._read_reason(choice.finish_reason)
                if choice.text:
                    # Servers that do not count on the way send a token at a time.
                    tokens = 1 if chunk.usage is None else max(0, chunk.usage.completion_tokens - builder.made)
                    delta = builder.push(choice.text, tokens=tokens)
                    if delta is not None:
                        yield self._count_prompt(request, delta, counts)
                        if delta.finish_reason is not None:
                            return
        if reason is None:
            raise EngineError(f"{self.who} ended its stream without saying that the answer is complete.", remedy="ask again")
        missing = 0 if counts is None else max(0, counts.completion_tokens - builder.made)
        yield self._count_prompt(request, builder.end(reason, tokens=missing), counts)

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def settings(self, request: GenerationRequest) -> dict[str, Any]:
        """What every streamed request has: the model, and the sampling as far as this server takes it."""
        body: dict[str, Any] = {
            "model": self._model if request.adapter is None else request.adapter,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            **_SETTINGS.get(self._kind, {}),
        }
        optional = {"top_k": request.top_k or None, "min_p": request.min_p or None, "seed": request.seed}
        body.update({name: value for name, value in optional.items() if value is not None})
        if self._kind == "vllm":
            body["stream_options"]["continuous_usage_stats"] = True
        return body

    def _body(self, request: GenerationRequest, context_tokens: int) -> dict[str, Any]:
        ids = request.prompt_ids + request.reply_ids
        if self._counts_tokens:
            limit = room_for_answer(request, context_tokens)
        else:
            check_prompt(request)
            # A byte is a token at most; servers give few tokens where no limit is named.
            limit = request.max_tokens or max(context_tokens - len(ids), context_tokens // 2)
        body = {**self.settings(request), "prompt": ids if self._takes_ids else self._spell(ids), "max_tokens": limit}
        if self._takes_ids and self._kind in ("vllm", "sglang"):
            body["stop_token_ids"] = list(request.stop_ids)
        elif request.stop_ids:
            body["stop"] = [self._tokenizer.token_text(stop_id) for stop_id in request.stop_ids[:_MAX_STOPS]]
        return body

    def _spell(self, ids: list[int]) -> str:
        """The text of `ids` without a BOS token, which servers put before a text themselves."""
        bos = self._tokenizer.bos_id
        return self._tokenizer.decode(ids[1:] if bos is not None and ids[:1] == [bos] else ids)

    def _count_prompt(self, request: GenerationRequest, delta: GenerationDelta, counts: _Counts | None) -> GenerationDelta:
        """The usage with the server's count of the prompt, where ours is none of tokens; without a begun reply's share."""
        if delta.usage is None or self._counts_tokens:
            return delta
        told, share = 0 if counts is None else counts.prompt_tokens, len(request.prompt_ids)
        prompt_tokens = round(told * share / (share + len(request.reply_ids)))
        return msgspec.structs.replace(delta, usage=Usage(prompt_tokens, delta.usage.completion_tokens))

    def _read_reason(self, told: str) -> FinishReason:
        if told not in ("stop", "length"):
            raise EngineError(f"{self.who} ended the answer with {told!r}.", remedy="ask again")
        return cast(FinishReason, told)

    async def stream(
        self, path: str, body: dict[str, Any], event: type[Event], *, blames: str = ""
    ) -> AsyncGenerator[Event, None]:
        """The events that answer `body` at `path`. Raises `EngineLostError` when the server is gone, `WrongRequestError` where
        it refuses and there is a parameter that it `blames`, and `EngineError` when it fails.
        """
        import aiohttp

        try:
            async with self._connect().post(self._url + path, json=body) as response:
                if response.status != 200:
                    message = f"{self.who} refused the request: {tell_error(await response.read())}"
                    if blames and response.status in _REFUSED:
                        raise WrongRequestError(message, parameter=blames)
                    raise EngineError(message)
                async for line in read_lines(response.content.iter_any()):
                    name, _, value = line.strip().partition(b":")
                    if name == b"error":
                        raise EngineError(f"{self.who} failed while generating: {tell_error(value)}")
                    if name != b"data" or value.strip() == b"[DONE]":
                        continue
                    chunk = msgspec.json.decode(value, type=event)
                    if chunk.error is not None:
                        raise EngineError(f"{self.who} failed while generating: {tell_error(value)}")
                    yield chunk
        except msgspec.DecodeError as error:
            raise EngineError(f"{self.who} sent an event that is no completion.", remedy="check --url") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLostError(f"the connection to {self.who} broke ({type(error).__name__}).") from error

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=_ASK_S, sock_connect=_CONNECT_S)
            async with self._connect().request(method, self._url + path, json=body, timeout=timeout) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._cannot_serve(f"is not reachable ({type(error).__name__})") from error

    def _connect(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            # Connections of their own: some servers break kept ones after a stream, and closing one is what ends their work.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                trust_env=urlsplit(self._url).hostname not in ("127.0.0.1", "localhost", "::1"),
            )
        return self._session

    def _cannot_serve(self, why: str, remedy: str = "check the URL and the key, and that the server runs") -> EngineError:
        """For those who start a worker: they know the address, which clients do not get to see."""
        return EngineError(f"{self.who} at {self._url} {why}.", remedy=remedy)


def check_url(url: str | None) -> str:
    """`url` if it is one of http or https. Raises `UsageError`."""
    parts = urlsplit(url or "")
    if url is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is no URL of a server.", remedy="--url http://HOST:PORT/v1")
    return url
