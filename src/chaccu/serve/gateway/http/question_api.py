"""`QuestionApi`: what is asked of a model and is no answer: token ids, their text and number, vectors.

Invariants: a wrong request is answered with an error object before any worker hears of it; embeddings take their turn at the
workers as answers do, questions to a tokenizer take none. It ignores how a question reaches a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Send

from chaccu.serve.gateway.access.keys import Key
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.dialects.message_writer import MessagesErrorBody
from chaccu.serve.gateway.dialects.messages import COUNT_UNUSED, CountTokensAnswer, CountTokensBody
from chaccu.serve.gateway.dialects.openapi import Endpoint
from chaccu.serve.gateway.dialects.parameters import Unused, parse_body
from chaccu.serve.gateway.dialects.question_bodies import (
    EMBEDDINGS_UNUSED,
    TOKENIZE_UNUSED,
    DetokenizeAnswer,
    DetokenizeBody,
    EmbeddingsAnswer,
    EmbeddingsBody,
    TokenizeAnswer,
    TokenizeBody,
)
from chaccu.serve.gateway.dialects.relayed_request import RelayedEmbeddings, check_relayed
from chaccu.serve.gateway.http.admission import estimate_tokens
from chaccu.serve.gateway.http.client_limits import answer_late
from chaccu.serve.gateway.http.reception import Received, Reception
from chaccu.serve.gateway.http.until_disconnect import UntilDisconnect, send_piece, send_start
from chaccu.serve.gateway.workers.abilities import check_needs
from chaccu.serve.gateway.workers.back_pressure import BackPressure
from chaccu.serve.gateway.workers.questions import ask_worker
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.link import Embed, Piece, Question

_NOTHING = Unused(neutral={}, about=frozenset())
_EMBEDS = {"embeddings": "input"}
_TOKENIZE, _DETOKENIZE, _EMBEDDINGS = "/tokenize", "/detokenize", "/v1/embeddings"
_Body = TokenizeBody | DetokenizeBody | EmbeddingsBody | CountTokensBody
_Relay = Callable[[Received, str], UntilDisconnect]

QUESTIONS = (
    Endpoint(
        path=_TOKENIZE,
        summary="Token ids of a prompt.",
        body=TokenizeBody,
        answer=TokenizeAnswer,
        unused=TOKENIZE_UNUSED,
        one_of=("prompt", "messages"),
    ),
    Endpoint(
        path=_DETOKENIZE,
        summary="The text of token ids.",
        body=DetokenizeBody,
        answer=DetokenizeAnswer,
    ),
    Endpoint(
        path=_EMBEDDINGS,
        summary="OpenAI's embeddings.",
        body=EmbeddingsBody,
        answer=EmbeddingsAnswer,
        unused=EMBEDDINGS_UNUSED,
    ),
    Endpoint(
        path="/v1/messages/count_tokens",
        summary="How many tokens the prompt of a message has.",
        body=CountTokensBody,
        answer=CountTokensAnswer,
        error=MessagesErrorBody,
        unused=COUNT_UNUSED,
    ),
)


class QuestionApi:
    """The endpoints over workers; embeddings over upstreams too, by `relay`."""

    def __init__(
        self, config: GatewayConfig, reception: Reception, queues: BackPressure, registry: WorkerRegistry, relay: _Relay
    ) -> None:
        self._config = config
        self._reception = reception
        self._queues = queues
        self._registry = registry
        self._relay = relay

    def routes(self) -> list[Route]:
        """The endpoints."""
        return [Route(endpoint.path, self._endpoint(endpoint), methods=["POST"]) for endpoint in QUESTIONS]

    def _endpoint(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[UntilDisconnect]]:
        return partial(self._receive, endpoint.path, endpoint.body, endpoint.unused)

    async def _receive(self, path: str, body_type: type[Any], unused: Unused | None, request: Request) -> UntilDisconnect:
        received = await self._reception.receive(request)
        if received.is_upstream:
            check_relayed(received.fields, path, RelayedEmbeddings if path == _EMBEDDINGS else None)
            return self._relay(received, path)
        body: _Body = parse_body(received.fields, body_type, unused or _NOTHING)
        questions = body.questions()
        if isinstance(body, EmbeddingsBody):
            check_needs(_EMBEDS, self._registry.offers(received.model))
        return UntilDisconnect(lambda send: self._answer(received, body, questions, send))

    async def _answer(self, received: Received, body: _Body, questions: Sequence[Question], send: Send) -> None:
        async with received.admit(estimate_tokens(len(received.data), None)) as admitted:
            try:
                async with asyncio.timeout(self._config.request_timeout_s or None) as limit:
                    pieces = [await self._ask(received, question, admitted.key) for question in questions]
            except TimeoutError:
                if not limit.expired():
                    raise
                raise answer_late(self._config.request_timeout_s) from None
            if isinstance(body, EmbeddingsBody):
                prompt_tokens = sum(piece.prompt_tokens for piece in pieces)
                admitted.use(prompt_tokens, 0)
                received.note.finish(prompt_tokens, 0, "stop")
            else:
                admitted.use(0, 0)
            context_tokens = min((offer.context_tokens for offer in self._registry.offers(received.model)), default=0)
            answer = msgspec.json.encode(body.write(pieces, context_tokens))
            await send_start(send, b"application/json", more=admitted.headers)
            await send_piece(send, answer, last=True)

    async def _ask(self, received: Received, question: Question, key: Key | None) -> Piece:
        takes_turn = isinstance(question, Embed)
        turn = self._queues.turn(received.model, "" if key is None else key.id) if takes_turn else contextlib.nullcontext()
        async with turn:
            return await ask_worker(
                self._registry,
                msgspec.structs.replace(question, request_id=received.note.id, trace=received.note.trace),
                needs=frozenset(_EMBEDS) if takes_turn else frozenset(),
                wait_s=self._config.rejoin_wait_s,
                max_attempts=self._config.max_attempts,
                on_tried=received.note.try_worker,
            )
