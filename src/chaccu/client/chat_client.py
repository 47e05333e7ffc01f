"""`ChatClient`: the only place that sends chat requests over HTTP, to any OpenAI-compatible server.

Invariants: a request ends in deltas of which the last carries a finish reason, or in one `ChatError` that names what happened,
the model and the server; an answer that was cut off is never taken for a whole one. Nothing is retried here: who asks decides.
It ignores tool calls, logprobs and the reasoning texts that some servers send beside the answer.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import urlsplit

from chaccu.client.chats import ChatDelta, Completion, Messages, Sampling, Usage, read_chunk, read_name, write_request
from chaccu.client.errors import (
    AnswerTimeoutError,
    InvalidAnswerError,
    RequestRefusedError,
    ServerUnreachableError,
    UnknownModelError,
    from_server,
    read_retry_after_s,
)
from chaccu.errors import UsageError, did_you_mean

_CONNECT_S = 10.0


class ChatClient:
    """Asks one server. Use it in one event loop, as `async with ChatClient(url) as client`, or call `close`."""

    def __init__(self, base_url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        """`base_url`: the server's address, with or without `/v1`. `timeout_s`: the longest silence while an answer is awaited.

        Raises `UsageError` when the URL is none.
        """
        import openai

        self.base_url = api_root(base_url)
        self._timeout_s = timeout_s
        # Models that take `max_completion_tokens` alone, and a temperature of their own.
        self._renamed: set[str] = set()
        self._own_temperature: set[str] = set()
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
        request = write_request(model, messages, sampling or Sampling())
        if response_format is not None:
            request["response_format"] = dict(response_format)
        finish_reason: str | None = None
        usage: Usage | None = None
        answered_as: str | None = None
        async with contextlib.AsyncExitStack() as stack:
            try:
                stream = await self._open_stream(request)
                stack.push_async_callback(stream.close)
                async for chunk in stream:
                    text, reason, counted = read_chunk(chunk)
                    finish_reason, usage = reason or finish_reason, counted or usage
                    answered_as = answered_as or read_name(chunk)
                    if text:
                        yield ChatDelta(text)
            except Exception as error:
                await self._explain(error, model)
        if finish_reason is None:
            raise InvalidAnswerError(
                f"the answer of {model} broke off: {self.base_url} ended the stream without a finish reason.",
                remedy="ask again; if it stays so, check that the URL is that of an OpenAI-compatible API",
                model=model,
                was_taken=True,
            )
        yield ChatDelta("", finish_reason, usage, answered_as)

    async def _open_stream(self, request: dict[str, Any]) -> Any:
        """Ask. Newer models of OpenAI's own server refuse `max_tokens`, and temperatures but their own: they are asked again
        without, and so from then on."""
        import openai

        model = request["model"]
        for _ in range(3):
            asked = dict(request)
            if model in self._renamed and "max_tokens" in asked:
                asked["max_completion_tokens"] = asked.pop("max_tokens")
            if model in self._own_temperature:
                asked.pop("temperature", None)
            try:
                return await self._api.chat.completions.create(**asked)
            except openai.BadRequestError as error:
                if "max_tokens" in asked and "max_completion_tokens" in str(error):
                    self._renamed.add(model)
                elif "temperature" in asked and error.param == "temperature" and error.code == "unsupported_value":
                    self._own_temperature.add(model)
                else:
                    raise
        raise AssertionError("each of two parameters is left out once")

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
        if isinstance(error, openai.APIConnectionError) and not _is_connected(error):
            raise ServerUnreachableError(
                f"{self.base_url} cannot be reached: {_reason(error)}.",
                remedy="check that the server runs and that the URL is right",
                model=model,
            ) from error
        if isinstance(error, openai.APITimeoutError):
            raise AnswerTimeoutError(
                f"{_whom(model)} at {self.base_url} was silent for {self._timeout_s:g} s, the limit.",
                remedy="ask again, or allow more time",
                model=model,
                was_taken=True,
            ) from error
        if isinstance(error, openai.APIStatusError):
            explained = from_server(error, error.status_code, self.base_url, model)
            explained.retry_after_s = read_retry_after_s(error.response.headers)
            raise explained from error
        if isinstance(error, openai.APIConnectionError):
            raise ServerUnreachableError(
                f"the connection to {self.base_url} broke: {_reason(error)}.",
                remedy="ask again; the server's log says more",
                model=model,
                was_taken=True,
            ) from error
        if isinstance(error, openai.APIError) and not isinstance(error, openai.APIResponseValidationError):
            explained = from_server(error, None, self.base_url, model)
            explained.was_taken = True
            raise explained from error
        if isinstance(error, (openai.OpenAIError, ValueError, TypeError, AttributeError)):
            raise InvalidAnswerError(
                f"what {self.base_url} sent is not in the form of the OpenAI API: {str(error)[:200] or type(error).__name__}.",
                remedy="check that the URL is that of an OpenAI-compatible API",
                model=model,
                was_taken=True,
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


def _whom(model: str | None) -> str:
    return "the server" if model is None else f"the model {model}"


def _is_connected(error: Exception) -> bool:
    """Whether the request may have reached the server. Both HTTP libraries that openai can use name these errors alike."""
    return type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError")


def _reason(error: Exception) -> str:
    cause = error.__cause__
    if type(cause).__name__ == "ConnectTimeout":
        return f"no connection within {_CONNECT_S:g} s"
    return str(cause).rstrip(".") or type(cause).__name__ if cause is not None else str(error).rstrip(".")
