"""`AnswerApi`: from a request to its answer, in every dialect.

Invariants: a wrong request is answered with an error object before any worker hears of it; a stream's status is sent with its
first text, so what fails before that is an HTTP error, and what fails later is an event in the stream. It ignores how an
answer is made and written.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from chaccu.serve.gateway.access.aliases import Aliases
from chaccu.serve.gateway.access.models import list_models
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.dialects.dialect import AnswerWriter, Asked, Dialect
from chaccu.serve.gateway.dialects.relayed_request import check_relayed
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.http.admission import Admission, Admitted, estimate_tokens
from chaccu.serve.gateway.http.client_limits import answer_late
from chaccu.serve.gateway.http.metrics import GatewayMetrics
from chaccu.serve.gateway.http.reception import Received, Reception
from chaccu.serve.gateway.http.relayed_response import send_relayed
from chaccu.serve.gateway.http.request_note import RequestNote
from chaccu.serve.gateway.http.until_disconnect import UntilDisconnect, send_piece, send_start
from chaccu.serve.gateway.records.conversation_log import ConversationLog
from chaccu.serve.gateway.records.logged_answer import WorkerAnswer
from chaccu.serve.gateway.records.relayed_answer import RelayedAnswer
from chaccu.serve.gateway.upstreams.upstream import UpstreamRelay
from chaccu.serve.gateway.workers.abilities import check_abilities
from chaccu.serve.gateway.workers.answer import AnswerPart, Job, stream_answer
from chaccu.serve.gateway.workers.back_pressure import BackPressure
from chaccu.serve.gateway.workers.choices import collect_choices, stream_choices
from chaccu.serve.gateway.workers.hedging import Hedging
from chaccu.serve.gateway.workers.registry import WorkerRegistry

_Admit = Callable[[], contextlib.AbstractAsyncContextManager[Admitted]]


class AnswerApi:
    """`/v1/models`, and the endpoints of dialects, over workers and upstreams."""

    def __init__(
        self,
        config: GatewayConfig,
        reception: Reception,
        admission: Admission,
        aliases: Aliases,
        queues: BackPressure,
        registry: WorkerRegistry,
        upstreams: UpstreamRelay,
        metrics: GatewayMetrics,
        clock: Callable[[], float],
        log: ConversationLog | None,
    ) -> None:
        self._config = config
        self._reception = reception
        self._admission = admission
        self._aliases = aliases
        self._queues = queues
        self._registry = registry
        self._upstreams = upstreams
        self._metrics = metrics
        self._clock = clock
        self._hedging = Hedging(clock) if config.hedge else None
        self._log = log
        self._began_s = int(time.time())

    async def models(self, request: Request) -> Response:
        """The models that answer now."""
        key = self._admission.identify(request.scope["headers"])
        contexts: dict[str, int | None] = {**dict.fromkeys(self._upstreams.names), **self._registry.models()}
        listed = list_models(contexts, self._aliases, key, self._began_s)
        return Response(msgspec.json.encode(listed), media_type="application/json")

    def endpoint(self, dialect: Dialect) -> Callable[[Request], Awaitable[UntilDisconnect]]:
        """What answers requests in `dialect`."""
        return partial(self._endpoint, dialect)

    async def _endpoint(self, dialect: Dialect, request: Request) -> UntilDisconnect:
        received = await self._reception.receive(request)
        is_logged = self._log is not None and dialect.is_chat
        if received.is_upstream:
            check_relayed(received.fields, dialect.path, dialect.relayed)
            return self.relay(received, dialect.path, RelayedAnswer(received.model, received.data) if is_logged else None)
        note = received.note
        asked = dialect.read(received.fields)
        check_abilities(asked.job.request(), self._registry.offers(received.model))
        job = msgspec.structs.replace(asked.job, request_id=note.id, trace=note.trace)
        tokens = estimate_tokens(len(received.data), (job.sampling.max_tokens or 0) * job.choices)
        admit = partial(received.admit, tokens)
        logged = WorkerAnswer(asked.answer_id, job, asked.user) if is_logged else None
        return UntilDisconnect(lambda send: self._answer(admit, asked, job, send, logged, note))

    def relay(self, received: Received, path: str, logged: RelayedAnswer | None = None) -> UntilDisconnect:
        """The answer of an upstream to what was received at `path`."""
        # An upstream's tokens are not counted, for its bytes are not read: the estimate stays.
        admit = partial(received.admit, estimate_tokens(len(received.data), None))
        endpoint, data = path.removeprefix("/v1/"), received.data
        return UntilDisconnect(lambda send: self._relay(admit, received.model, endpoint, data, send, logged, received.note))

    async def _relay(
        self,
        admit: _Admit,
        model: str,
        endpoint: str,
        data: bytes,
        send: Send,
        logged: RelayedAnswer | None,
        note: RequestNote,
    ) -> None:
        try:
            async with asyncio.timeout(self._config.request_timeout_s or None) as limit:
                async with admit() as admitted:
                    status = await send_relayed(self._upstreams, model, endpoint, data, send, logged, admitted.headers, note)
                    admitted.close(status)
        except TimeoutError:
            if not limit.expired():
                raise
            # Where the response has begun, only the connection's end can say that there is no more.
            self._give_up(note)
        finally:
            if self._log is not None and logged is not None:
                self._log.add(logged)

    async def _answer(
        self, admit: _Admit, asked: Asked, job: Job, send: Send, logged: WorkerAnswer | None, note: RequestNote
    ) -> None:
        try:
            async with asyncio.timeout(self._config.request_timeout_s or None) as limit:
                async with (
                    admit() as admitted,
                    contextlib.aclosing(self._parts(job, logged, admitted, note)) as parts,
                ):
                    write = self._send_stream if asked.streamed else self._send_whole
                    await write(parts, asked.writer, send, admitted)
        except TimeoutError:
            if not limit.expired():
                raise
            late = self._give_up(note)
            if logged is not None:
                logged.fail(late)
            if asked.streamed:
                await send_piece(send, asked.writer.failure(late), last=True)
        finally:
            if self._log is not None and logged is not None:
                self._log.add(logged)

    def _give_up(self, note: RequestNote) -> ApiError:
        """What a client is told whose answer takes longer than any may; raises it where nothing has been sent."""
        late = answer_late(self._config.request_timeout_s)
        note.fail(late)
        if not note.status:
            raise late
        return late

    async def _parts(
        self, job: Job, logged: WorkerAnswer | None, admitted: Admitted, note: RequestNote
    ) -> AsyncGenerator[AnswerPart, None]:
        """The answer's parts, noted, and kept where they are logged."""
        parts = stream_choices(job, self._registry.room(job.model), partial(self._one_answer, admitted, note))
        async with contextlib.aclosing(parts):
            try:
                async for part in parts:
                    note.note_text()
                    if part.usage is not None:
                        note.finish(part.usage.prompt_tokens, part.usage.completion_tokens, part.finish_reason or "stop")
                        admitted.use(part.usage.prompt_tokens, part.usage.completion_tokens)
                    if logged is not None:
                        logged.take(part)
                    yield part
            except ApiError as error:
                note.fail(error)
                if logged is not None:
                    logged.fail(error)
                raise

    async def _one_answer(self, admitted: Admitted, note: RequestNote, job: Job) -> AsyncGenerator[AnswerPart, None]:
        """One answer in parts, once it is its turn."""
        parts = stream_answer(
            self._registry,
            job,
            wait_s=self._config.rejoin_wait_s,
            max_attempts=self._config.max_attempts,
            on_event=partial(self._metrics.count_event, job.model),
            hedging=self._hedging,
            on_tried=note.try_worker,
        )
        turn = self._queues.turn(job.model, "" if admitted.key is None else admitted.key.id)
        asked_s = self._clock()
        async with turn, contextlib.aclosing(parts):
            self._metrics.time_queue(job.model, self._clock() - asked_s)
            async for part in parts:
                yield part

    async def _send_stream(
        self, parts: AsyncGenerator[AnswerPart, None], writer: AnswerWriter, send: Send, admitted: Admitted
    ) -> None:
        part = await anext(parts)
        await send_start(send, b"text/event-stream; charset=utf-8", more=admitted.headers)
        opening = writer.opening(part)
        try:
            while part.usage is None:
                await send_piece(send, opening + writer.texts(part))
                opening = b""
                part = await anext(parts)
        except ApiError as error:
            # The status has been sent; the client learns it from the stream.
            await send_piece(send, writer.failure(error), last=True)
            return
        await send_piece(send, opening + writer.ending(part, part.usage), last=True)

    async def _send_whole(
        self, parts: AsyncGenerator[AnswerPart, None], writer: AnswerWriter, send: Send, admitted: Admitted
    ) -> None:
        body = writer.whole(*await collect_choices(parts))
        await send_start(send, b"application/json", more=admitted.headers)
        await send_piece(send, body, last=True)
