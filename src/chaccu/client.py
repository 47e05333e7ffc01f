"""`ChatClient`: the only place that sends chat requests over HTTP, to any OpenAI-compatible server.

Invariants: a request ends in deltas of which the last carries a finish reason, or in one `ChatError` that names what happened,
the model and the server; an answer that was cut off is never taken for a whole one. Nothing is retried here: who asks decides.
It ignores tool calls, logprobs and the reasoning texts that some servers send beside the answer.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, ClassVar, NoReturn, TypeAlias
from urllib.parse import urlsplit

import msgspec

from chaccu.conversation import Conversation, Message
from chaccu.errors import ChaccuError, UsageError, did_you_mean

_CONNECT_S = 10.0

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


class ChatError(ChaccuError):
    """A chat request failed.

    `cause` is a short stable name for counting; `model` is the model that was asked, if any; `retry_after_s` is how long the
    server wants to be left alone, if it says so.
    """

    cause: ClassVar[str] = "failed"

    def __init__(self, message: str, *, remedy: str = "", model: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.model = model
        self.retry_after_s = retry_after_s


class ServerUnreachableError(ChatError):
    """Nothing answers at the URL, or the connection broke."""

    cause = "server unreachable"


class UnknownModelError(ChatError):
    """The server has no model of that name."""

    cause = "unknown model"


class NoWorkerError(ChatError):
    """The model is known to the gateway, but nobody serves it at the moment."""

    cause = "no worker"


class WorkerLostError(ChatError):
    """The worker that wrote the answer has gone, and no other could go on."""

    cause = "worker lost"


class ContextFullError(ChatError):
    """The conversation and the answer asked for do not fit into the model's context."""

    cause = "context full"


class LimitReachedError(ChatError):
    """The server takes no more requests from this client now (HTTP 429)."""

    cause = "limit reached"


class AnswerTimeoutError(ChatError):
    """Nothing came for longer than the client's time limit."""

    cause = "time-out"


class AccessDeniedError(ChatError):
    """The key is missing, wrong or not allowed to do this (HTTP 401, 403)."""

    cause = "access denied"


class RequestRefusedError(ChatError):
    """The server takes the request for a wrong one (other HTTP 4xx)."""

    cause = "request refused"


class ServerFailedError(ChatError):
    """The server itself failed (HTTP 5xx)."""

    cause = "server failed"


class InvalidAnswerError(ChatError):
    """What came back is no answer of an OpenAI-compatible server, or it was cut off."""

    cause = "invalid answer"


class ChatClient:
    """Asks one server. Use it in one event loop, as `async with ChatClient(url) as client`, or call `close`."""

    def __init__(self, base_url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        """`base_url`: the server's address, with or without `/v1`. `timeout_s`: the longest silence while an answer is awaited.

        Raises `UsageError` when the URL is none.
        """
        import openai

        self.base_url = api_root(base_url)
        self._timeout_s = timeout_s
        timeout = openai.Timeout(timeout_s, connect=_CONNECT_S)
        # A proxy from the environment cannot reach this machine's own loopback.
        transport = openai.DefaultAsyncHttpxClient(timeout=timeout, trust_env=not _is_loopback(self.base_url))
        self._api = openai.AsyncOpenAI(
            base_url=self.base_url, api_key=api_key or "none", timeout=timeout, max_retries=0, http_client=transport
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def models(self) -> list[str]:
        """Names of the models that the server offers, in its order. Raises `ChatError`."""
        try:
            page = await self._api.models.list()
            names = [model.id for model in page.data]
        except Exception as error:
            await self._explain(error, None)
        if not all(isinstance(name, str) for name in names):
            raise InvalidAnswerError(f"the list of models at {self.base_url} holds entries without a name.")
        return names

    async def stream_chat(
        self,
        model: str,
        messages: Messages,
        sampling: Sampling | None = None,
        *,
        response_format: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[ChatDelta, None]:
        """The answer of `model`, piece by piece; closing the iterator ends the work at the server.

        `response_format`: as the OpenAI API has it, for servers that can hold an answer to a JSON schema. Raises `ChatError`.
        """
        request = _request(model, messages, sampling or Sampling())
        if response_format is not None:
            request["response_format"] = dict(response_format)
        finish_reason: str | None = None
        usage: Usage | None = None
        answered_as: str | None = None
        async with contextlib.AsyncExitStack() as stack:
            try:
                stream = await self._api.chat.completions.create(**request)
                stack.push_async_callback(stream.close)
                async for chunk in stream:
                    text, reason, counted = _read_chunk(chunk)
                    finish_reason, usage = reason or finish_reason, counted or usage
                    answered_as = answered_as or _read_name(chunk)
                    if text:
                        yield ChatDelta(text)
            except Exception as error:
                await self._explain(error, model)
        if finish_reason is None:
            raise InvalidAnswerError(
                f"the answer of {model} broke off: {self.base_url} ended the stream without a finish reason.",
                remedy="ask again; if it stays so, check that the URL is that of an OpenAI-compatible API",
                model=model,
            )
        yield ChatDelta("", finish_reason, usage, answered_as)

    async def complete_chat(
        self,
        model: str,
        messages: Messages,
        sampling: Sampling | None = None,
        *,
        response_format: Mapping[str, Any] | None = None,
    ) -> Completion:
        """The whole answer of `model`; see `stream_chat`. Raises `ChatError`."""
        texts: list[str] = []
        last = ChatDelta("")
        async with contextlib.aclosing(self.stream_chat(model, messages, sampling, response_format=response_format)) as stream:
            async for last in stream:
                texts.append(last.text)
        return Completion("".join(texts), last.finish_reason or "", last.usage, last.model)

    async def _explain(self, error: Exception, model: str | None) -> NoReturn:
        """Raise the `ChatError` that says what `error` means; what is no failure of the request goes on as it is."""
        import openai

        if isinstance(error, openai.NotFoundError) and model is not None:
            await self._explain_not_found(error, model)
        if isinstance(error, openai.APITimeoutError):
            raise AnswerTimeoutError(
                f"{_whom(model)} at {self.base_url} was silent for {self._timeout_s:g} s, the limit.",
                remedy="ask again, or allow more time",
                model=model,
            ) from error
        if isinstance(error, openai.APIStatusError):
            explained = _from_server(error, error.status_code, self.base_url, model)
            explained.retry_after_s = _retry_after_s(error.response.headers)
            raise explained from error
        if isinstance(error, openai.APIConnectionError):
            raise ServerUnreachableError(
                f"{self.base_url} cannot be reached: {_reason(error)}.",
                remedy="check that the server runs and that the URL is right",
                model=model,
            ) from error
        if isinstance(error, openai.APIError) and not isinstance(error, openai.APIResponseValidationError):
            raise _from_server(error, None, self.base_url, model) from error
        if isinstance(error, (openai.OpenAIError, ValueError, TypeError, AttributeError)):
            raise InvalidAnswerError(
                f"what {self.base_url} sent is not in the form of the OpenAI API: {str(error)[:200] or type(error).__name__}.",
                remedy="check that the URL is that of an OpenAI-compatible API",
                model=model,
            ) from error
        raise error

    async def _explain_not_found(self, error: Exception, model: str) -> NoReturn:
        names = await self.models()
        if model in names:
            raise RequestRefusedError(f"{self.base_url} has no chat completions for {model}.", model=model) from error
        remedy = did_you_mean(model, names) if names else "start a worker for it; the server offers no model now"
        raise UnknownModelError(f"there is no model {model!r} at {self.base_url}.", remedy=remedy, model=model) from error


def api_root(base_url: str) -> str:
    """`base_url` with a scheme and the API's path: `localhost:8000` → `http://localhost:8000/v1`. Raises `UsageError`."""
    url = base_url.strip()
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"{base_url!r} is no URL of a server.", remedy="give one such as http://127.0.0.1:8000")
    return url if parts.path else f"{url}/v1"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _request(model: str, messages: Messages, sampling: Sampling) -> dict[str, Any]:
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


def _read_chunk(chunk: Any) -> tuple[str, str | None, Usage | None]:
    """Text, finish reason and usage of one chunk, which the library does not check for its form."""
    choices = chunk.choices
    usage = chunk.usage and Usage(int(chunk.usage.prompt_tokens), int(chunk.usage.completion_tokens))
    if not choices:
        return "", None, usage
    text = choices[0].delta.content or ""
    if not isinstance(text, str):
        raise TypeError(f"a piece of text is {text!r:.80}")
    return text, choices[0].finish_reason, usage


def _read_name(chunk: Any) -> str | None:
    return chunk.model if isinstance(chunk.model, str) and chunk.model else None


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """What a `Retry-After` asks for, as seconds or as a date (RFC 9110, 10.2.3); None where it is missing or unreadable."""
    given = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", given):
        return float(given)
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except ValueError:
        return None


def _whom(model: str | None) -> str:
    return "the server" if model is None else f"the model {model}"


def _reason(error: Exception) -> str:
    cause = error.__cause__
    return str(cause).rstrip(".") or type(cause).__name__ if cause is not None else str(error).rstrip(".")


def _from_server(error: Any, status: int | None, url: str, model: str | None) -> ChatError:
    """What a server's own error object means; `status` is None for one inside a stream."""
    code, said = str(error.code or ""), _said(error, status)
    # The message of a gateway names the model and what happened already; it goes through as it is.
    known: dict[str, tuple[type[ChatError], str]] = {
        "worker_lost": (WorkerLostError, "ask again, or choose another model meanwhile"),
        "no_worker": (NoWorkerError, "choose another model, or start a worker for this one"),
        "model_not_found": (UnknownModelError, "choose a model that the server lists"),
        "context_length_exceeded": (ContextFullError, "begin a new conversation, or ask for fewer tokens"),
    }
    if code in known:
        kind, remedy = known[code]
        return kind(said, remedy=remedy, model=model)
    whom = f"{url} ({model})" if model else url
    if status == 429 or code in ("rate_limit_exceeded", "insufficient_quota"):
        return LimitReachedError(
            f"{whom} takes no more requests now: {said}", remedy="wait a little, then ask again", model=model
        )
    if status in (401, 403):
        return AccessDeniedError(f"{whom} refused the API key: {said}", remedy="give a valid key", model=model)
    if status == 404:
        return InvalidAnswerError(f"{url} is not the address of an OpenAI-compatible API (HTTP 404).", model=model)
    if status is not None and status < 500:
        return RequestRefusedError(f"{whom} refused the request (HTTP {status}): {said}", model=model)
    where = f" (HTTP {status})" if status else " in the middle of the answer"
    return ServerFailedError(f"{whom} failed{where}: {said}", remedy="ask again; the server's log says more", model=model)


def _said(error: Any, status: int | None) -> str:
    """The server's own message, kept short; a page of HTML is none."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    if not isinstance(message, str):
        message = f"HTTP {status}" if status is not None else str(error.message)
    return message if len(message) <= 500 else message[:499] + "…"
