"""`WorkerSession`: the requests of one connection to a gateway.

Invariants: each request that came in ends with exactly one piece with an `end`, sent after the engine has stopped working on
it; when the connection goes, all its requests are ended in the engine, for nobody reads them any more; when the engine is lost,
nothing is said of them, so that the gateway goes on with them elsewhere. Pieces that are ready at the same time leave in one
frame. It ignores how the connection was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from functools import partial
from typing import Protocol

from chaccu.engine import ContextOverflowError, EngineLostError, GenerationRequest, WatchedEngine, WrongRequestError
from chaccu.errors import ChaccuError, ConversationError, FormatError
from chaccu.serve.link import (
    Cancel,
    Detokenize,
    Drain,
    Embed,
    Failure,
    Found,
    FromWorker,
    Generate,
    LinkError,
    LoadAdapter,
    ModelOffer,
    Offers,
    Order,
    OrderDone,
    Output,
    Piece,
    Ping,
    Pong,
    Question,
    Share,
    Tokenize,
    TokenLogprob,
    decode_to_worker,
    encode_frame,
)
from chaccu.serve.worker.prompt import Prompt, PromptBuilder
from chaccu.serve.worker.served import NotServedError, Served, ServedModels
from chaccu.serve.worker.sharing import GatewayShares
from chaccu.serve.worker.work_log import WorkLog

# Longer texts are tokenised on a thread: below this the thread costs more than the work.
_INLINE_CHARS = 20_000
_CHECK_S = 0.5


class Connection(Protocol):
    """What a session needs of a WebSocket: `recv` raises when the connection is closed."""

    async def send(self, message: bytes, /) -> None: ...
    async def recv(self) -> str | bytes: ...


class WorkerSession:
    """Serves `Generate` frames from one connection until it closes or `draining` is set and all is done. `offered`: what the
    gateway has been told of `served` when it was joined."""

    def __init__(
        self,
        connection: Connection,
        served: ServedModels,
        announce: Callable[[str], None],
        log: WorkLog | None = None,
        shares: GatewayShares | None = None,
        offered: tuple[ModelOffer, ...] | None = None,
    ) -> None:
        self._connection = connection
        self._served = served
        self._engine = served.engine
        self._announce = announce
        self._log = log
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._pieces: list[Piece] = []
        self._is_asked = False
        self._has_news = asyncio.Event()
        self._loss: asyncio.Future[EngineLostError] = asyncio.get_running_loop().create_future()
        self._place = (shares or GatewayShares()).join(self._has_news.set)
        # What the gateway knows of the others: as if there were none, until it is told.
        self._told = Share()
        self._offered = served.offers if offered is None else offered
        self._unwatch = served.watch(self._has_news.set)
        self._orders: set[asyncio.Task[None]] = set()
        self._done_orders: list[OrderDone] = []

    async def run(self, draining: asyncio.Event, drain_s: float) -> None:
        """Serve. Raises what the connection raises when it is lost, `LinkError` for a wrong frame, and `EngineLostError`."""
        parts = [
            asyncio.create_task(self._receive()),
            asyncio.create_task(self._send()),
            asyncio.create_task(self._drain(draining, drain_s)),
            asyncio.create_task(self._watch_engine()),
        ]
        # What has changed since the gateway was joined.
        self._has_news.set()
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            self._unwatch()
            tasks = [*parts, *self._tasks.values(), *self._orders]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._place.leave()
            if self._log is not None:
                self._log.close()

    async def _receive(self) -> None:
        while True:
            data = await self._connection.recv()
            frame = decode_to_worker(data if isinstance(data, bytes) else data.encode())
            if isinstance(frame, Generate | Question):
                if self._log is not None:
                    self._log.begin(frame)
                task = asyncio.create_task(self._serve(frame))
                self._tasks[frame.request] = task
                self._place.begin()
                task.add_done_callback(partial(self._forget, frame.request))
            elif isinstance(frame, Cancel):
                # A request that is unknown has ended while this frame was on its way.
                if frame.request in self._tasks:
                    self._tasks[frame.request].cancel()
            elif isinstance(frame, Order):
                order = asyncio.create_task(self._obey(frame))
                self._orders.add(order)
                order.add_done_callback(self._orders.discard)
            elif isinstance(frame, Ping):
                # Sent from where all else is sent: what comes in never waits for what goes out.
                self._is_asked = True
                self._has_news.set()
            else:
                raise LinkError(f"the gateway sent an unexpected {type(frame).__name__} frame.")

    def _forget(self, request: int, _: asyncio.Task[None]) -> None:
        del self._tasks[request]
        self._place.end()

    async def _send(self) -> None:
        while True:
            await self._has_news.wait()
            await self._flush()

    async def _flush(self) -> None:
        self._has_news.clear()
        if self._is_asked:
            self._is_asked = False
            await self._send_frame(Pong())
        if self._place.share != self._told:
            self._told = self._place.share
            await self._send_frame(self._told)
        pieces, self._pieces = self._pieces, []
        if pieces:
            await self._send_frame(Output(pieces))
        if self._served.offers is not self._offered:
            self._offered = self._served.offers
            await self._send_frame(Offers(self._offered))
        # After the offers that an order has changed.
        orders, self._done_orders = self._done_orders, []
        for order in orders:
            await self._send_frame(order)

    async def _drain(self, draining: asyncio.Event, drain_s: float) -> None:
        """Once told to end: take nothing new, finish what there is within `drain_s`; the gateway hands over the rest."""
        await draining.wait()
        await self._send_frame(Drain())
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=drain_s)
        await self._flush()

    async def _watch_engine(self) -> None:
        """Raise `EngineLostError` when the engine is lost, be it with no request in it."""
        while not self._loss.done():
            if isinstance(self._engine, WatchedEngine):
                self._engine.check()
            await asyncio.wait([self._loss], timeout=_CHECK_S)
        raise self._loss.result()

    async def _send_frame(self, frame: FromWorker) -> None:
        await self._connection.send(encode_frame(frame))

    def _put(self, piece: Piece) -> None:
        if self._log is not None:
            self._log.take(piece)
        self._pieces.append(piece)
        self._has_news.set()

    async def _obey(self, order: Order) -> None:
        """Carry out an order, and say whether it could be."""
        refusal = remedy = ""
        try:
            if isinstance(order, LoadAdapter):
                await self._served.load(order.name, order.path)
            else:
                await self._served.unload(order.name)
        except ChaccuError as error:
            refusal, remedy = error.message, error.remedy
        except Exception as error:  # an order that fails must reach its gateway and leave what is served alone
            refusal = f"the worker failed ({type(error).__name__})."
            self._announce(f"{order}: {type(error).__name__}: {error}")
        else:
            self._announce(f"{'loaded' if isinstance(order, LoadAdapter) else 'unloaded'} the adapter {order.name}")
        self._done_orders.append(OrderDone(order=order.order, refusal=refusal, remedy=remedy))
        self._has_news.set()

    async def _serve(self, request: Generate | Question) -> None:
        try:
            with self._served.use(request.model) as served:
                if isinstance(request, Generate):
                    await self._generate(request, served)
                else:
                    await self._find(request, served)
        except asyncio.CancelledError:
            self._put(Piece(request.request, end="cancelled"))
        except NotServedError as error:
            self._put(Piece(request.request, end="failed", failure=Failure(kind="not_served", message=error.message)))
        except EngineLostError as error:
            if not self._loss.done():
                self._loss.set_result(error)
        except Exception as error:  # one request's failure must reach its client and leave the others alone
            self._put(Piece(request.request, end="failed", failure=_explain(error, _text_of(request))))
            if not isinstance(error, (ContextOverflowError, ConversationError, FormatError, WrongRequestError)):
                self._announce(f"the request {request.request_id} failed: {type(error).__name__}: {error}")

    async def _find(self, question: Question, served: Served) -> None:
        """Answer a question, in one piece."""
        number = question.request
        if isinstance(question, Tokenize):
            ids = await asyncio.to_thread(served.builder.tokenize, question)
            answer = Piece(number, end="stop", prompt_tokens=len(ids), found=Found(ids=ids))
        elif isinstance(question, Detokenize):
            answer = Piece(number, served.builder.detokenize(question.ids), end="stop")
        else:
            self._check_can({"embeddings": "input"})
            inputs = await asyncio.to_thread(served.builder.encode_inputs, question.inputs)
            found = await self._engine.embed(inputs, served.adapter)
            vectors = [struct.pack(f"<{len(vector)}f", *vector) for vector in found]
            answer = Piece(number, end="stop", prompt_tokens=sum(map(len, inputs)), found=Found(vectors=vectors))
        try:
            # In a frame of its own: it may be long.
            await self._send_frame(Output([answer]))
        except LinkError as error:
            parameter = {Tokenize: "prompt", Detokenize: "tokens", Embed: "input"}[type(question)]
            raise WrongRequestError(f"the answer is too long: {error.message}", parameter=parameter) from error
        if self._log is not None:
            self._log.take(answer)

    def _check_can(self, needs: dict[str, str]) -> None:
        """Raise `WrongRequestError` where the engine lacks one of the abilities, each with the parameter that asks for it."""
        for ability, parameter in needs.items():
            if ability not in self._engine.info.abilities:
                message = f"the engine {self._engine.info.engine} does not carry out {parameter}."
                raise WrongRequestError(message, parameter=parameter)

    async def _generate(self, request: Generate, served: Served) -> None:
        sampling = request.sampling
        self._check_can(request.needs())
        prompt = await _build(request, served.builder)
        generation = GenerationRequest(
            id=str(request.request),
            prompt_ids=prompt.prompt_ids,
            reply_ids=prompt.reply_ids,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop=prompt.stop,
            stop_ids=prompt.stop_ids,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=sampling.logit_bias,
            top_logprobs=sampling.top_logprobs,
            json_schema=sampling.json_schema,
            adapter=served.adapter,
            chat=request.chat,
        )
        prefix = _PrefixCutter(prompt.reply_prefix)
        tokens, prompt_tokens = 0, len(prompt.prompt_ids)
        logprobs: list[TokenLogprob] = []
        async with contextlib.aclosing(self._engine.generate(generation)) as deltas:
            async for delta in deltas:
                tokens += delta.tokens
                logprobs += [TokenLogprob(one.token, one.logprob, one.top) for one in delta.logprobs]
                text = prefix.cut(delta.text)
                if delta.finish_reason is not None:
                    text += prefix.flush()
                    # A chat format's own stop strings are no business of the client.
                    named = delta.stopped_by if delta.stopped_by in sampling.stop else None
                    end, told = delta.finish_reason, tuple(logprobs)
                    if delta.usage is not None:
                        prompt_tokens = delta.usage.prompt_tokens
                    self._put(Piece(request.request, text, tokens, prompt_tokens, end, stopped_by=named, logprobs=told))
                elif text or delta.tool_calls:
                    told, calls = tuple(logprobs), tuple(delta.tool_calls)
                    self._put(Piece(request.request, text, tokens, prompt_tokens, logprobs=told, tool_calls=calls))
                    tokens, logprobs = 0, []


async def _build(request: Generate, builder: PromptBuilder) -> Prompt:
    if request.chat is not None:
        # Written where it is answered.
        return Prompt(prompt_ids=[], stop=request.sampling.stop)
    turns = request.conversation.messages if request.conversation else ()
    chars = len(request.prompt) + len(request.begun) + sum(len(turn.content or "") for turn in turns)
    if chars < _INLINE_CHARS:
        return builder.build(request)
    return await asyncio.to_thread(builder.build, request)


class _PrefixCutter:
    """Cuts a format's own text from the beginning of an answer, if the answer begins with it."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._held = ""

    def cut(self, text: str) -> str:
        if not self._prefix:
            return text
        self._held += text
        if len(self._held) < len(self._prefix) and self._prefix.startswith(self._held):
            return ""
        text, self._held = self._held.removeprefix(self._prefix), ""
        self._prefix = ""
        return text

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _text_of(request: Generate | Question) -> str:
    """The parameter that gives a request's text, where it is not the messages."""
    if isinstance(request, Embed):
        return "input"
    is_raw = isinstance(request, Generate) and request.conversation is None and request.chat is None
    return "prompt" if is_raw else ""


def _explain(error: Exception, parameter: str) -> Failure:
    """What `error` tells a client; `parameter` is the one that may be too long, where it is not the messages."""
    if isinstance(error, ContextOverflowError):
        return Failure(
            kind="context_overflow",
            message=error.message,
            wanted_tokens=error.wanted_tokens,
            context_tokens=error.context_tokens,
            parameter=parameter,
        )
    if isinstance(error, WrongRequestError):
        return Failure(kind="invalid_request", message=error.message, parameter=error.parameter)
    if isinstance(error, (ConversationError, FormatError)):
        return Failure(kind="invalid_request", message=error.message)
    if isinstance(error, ChaccuError):
        return Failure(kind="engine_failed", message=error.message)
    return Failure(kind="engine_failed", message=f"the engine failed ({type(error).__name__}).")
