"""`FakeOpenAI`: a small OpenAI-compatible server for tests, with answers and failures by script.

Invariants: it listens on loopback at a port that the kernel picked; it keeps the body and the headers of every request; one
model's failure touches no other. Answers are cut into words, each one event after `delay_s`. It ignores sampling and counts a
word as a token.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from chaccu.testing.http_thread import HttpThread

Failure = Literal["worker_lost", "no_worker", "limit", "failed", "context", "garbage", "half", "cut", "silent", "denied"]
AnswerRule = Callable[[list[dict[str, Any]]], str]

_STATUS_FAILURES: dict[str, tuple[int, str, str]] = {
    "no_worker": (503, "no_worker", "No worker serves {model!r} now; waited 0 s for one to join."),
    "limit": (429, "rate_limit_exceeded", "Too many requests from this key."),
    "failed": (500, "engine_failed", "The engine of {model!r} failed."),
    "context": (400, "context_length_exceeded", "The conversation has 9000 tokens; {model!r} holds 4096."),
    "denied": (401, "invalid_api_key", "The key is not known."),
}


class FakeModel(msgspec.Struct, kw_only=True):
    """How one model behaves; tests change it while the server runs.

    `answer`: the text, or a function of the messages. `failure` happens after `fail_after` words for those inside the stream
    ("worker_lost", "half", "cut", "silent", "failed" with `fail_after` > 0), at once for the rest; `failures_left` counts the
    requests that still fail, None for all. `retry_after`: the header of a failure that has a status.
    """

    answer: str | AnswerRule = "Hello there."
    delay_s: float = 0.0
    failure: Failure | None = None
    fail_after: int = 0
    failures_left: int | None = None
    retry_after: str | None = None

    def take_failure(self) -> Failure | None:
        """What happens to the next request."""
        if self.failures_left is None:
            return self.failure
        self.failures_left -= 1
        return self.failure if self.failures_left >= 0 else None


class FakeOpenAI(HttpThread):
    """The server, in a thread. Use it as a context manager; `url` is its address."""

    def __init__(self, models: dict[str, FakeModel]) -> None:
        self.models = models
        self.requests: list[dict[str, Any]] = []
        self.request_headers: list[dict[str, str]] = []
        self.cancelled = 0
        routes = [
            Route("/v1/models", self._list_models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        super().__init__(routes)
        self.url = self.root

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.request_headers.append(dict(request.headers))
        name = body["model"]
        model = self.models.get(name)
        if model is None:
            return _error(404, "model_not_found", f"The model {name!r} does not exist.")
        failure = model.take_failure()
        if failure in _STATUS_FAILURES and not model.fail_after:
            status, code, message = _STATUS_FAILURES[failure]
            response = _error(status, code, message.format(model=name))
            if model.retry_after is not None:
                response.headers["Retry-After"] = model.retry_after
            return response
        if failure == "garbage":
            return Response("<html>It works!</html>", media_type="text/html")
        answer = model.answer if isinstance(model.answer, str) else model.answer(body["messages"])
        words = re.findall(r"\s*\S+\s*?(?=\s|$)|\s+", answer)
        if not body.get("stream"):
            return JSONResponse({**_head(name, "chat.completion"), **_whole(answer, len(words))})
        return StreamingResponse(self._events(name, model, words, failure), media_type="text/event-stream")

    async def _events(self, name: str, model: FakeModel, words: list[str], failure: Failure | None) -> AsyncIterator[bytes]:
        head = _head(name, "chat.completion.chunk")
        try:
            for index, word in enumerate(words):
                if failure is not None and index >= model.fail_after:
                    break
                await asyncio.sleep(model.delay_s)
                yield _event({**head, "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        match failure:
            case "worker_lost":
                message = f"The worker of {name!r} was lost while it answered, and no other joined."
                yield _event({"error": {"message": message, "type": "service_unavailable", "code": "worker_lost"}})
            case "failed":
                yield _event({"error": {"message": f"The engine of {name!r} failed.", "code": "engine_failed"}})
            case "half":
                yield b'data: {"choices": [{"index": 0, "delta": {"conte\n\n'
            case "silent":
                await asyncio.sleep(60)
            case None:
                yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                yield _event({**head, "choices": [], "usage": _usage(len(words))})
                yield b"data: [DONE]\n\n"


def _head(name: str, kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-fake", "object": kind, "created": 0, "model": name}


def _usage(words: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": words, "total_tokens": words + 1}


def _whole(answer: str, words: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": _usage(words)}


def _event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def _error(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": code}}, status_code=status)
