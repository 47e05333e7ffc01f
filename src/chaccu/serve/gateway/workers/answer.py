"""`stream_answer`: one answer out of as many workers as it takes.

Invariants: the pieces it gives, joined, are one answer; when a worker vanishes or its engine fails, the next one goes on from
exactly the text already given, and its tokens are counted once; when the caller leaves, the worker is told at once; a caller
that does not read holds a bounded number of pieces. It ignores how the answer is written to the client.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Literal

import msgspec

from chaccu.conversation import Conversation, ToolCallDelta, ToolChat
from chaccu.serve.gateway.errors import ApiError, from_failure, worker_lost
from chaccu.serve.gateway.workers.hedging import Hedging
from chaccu.serve.gateway.workers.prefix_table import Prefix, hash_prefix
from chaccu.serve.gateway.workers.race import AnswerEvent, Hedge, Race
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.remote_worker import AnswerPausedError, RemoteWorker, WorkerLostError
from chaccu.serve.link import Failure, Generate, Piece, Sampling, TokenLogprob, TraceContext

AnswerEnd = Literal["stop", "length", "tool_calls"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked for: a `conversation`, a `chat` with functions that may be called, or raw `prompts`. `begun`: a
    reply that the client itself has begun; it is not repeated in the answer. `n`: how many answers to each are wanted.
    `request_id`, `trace`: what operators know the request by.
    """

    model: str
    sampling: Sampling
    conversation: Conversation | None = None
    prompts: tuple[str | list[int], ...] = ()
    begun: str = ""
    chat: ToolChat | None = None
    n: int = 1
    request_id: str = ""
    trace: TraceContext | None = None

    @property
    def choices(self) -> int:
        """How many answers there are in all."""
        return self.n * max(1, len(self.prompts))

    def request(self, given: str = "", tokens: int = 0) -> Generate:
        """What a worker is asked for, behind the text that has been `given` of an answer, in `tokens`; the first prompt, where
        there are several.
        """
        sampling, prompt = self.sampling, self.prompts[0] if self.prompts else ""
        if sampling.max_tokens is not None:
            sampling = msgspec.structs.replace(sampling, max_tokens=sampling.max_tokens - tokens)
        return Generate(
            request=0,
            model=self.model,
            conversation=self.conversation,
            prompt=prompt if isinstance(prompt, str) else "",
            prompt_ids=[] if isinstance(prompt, str) else prompt,
            chat=self.chat,
            begun=self.begun + given,
            sampling=sampling,
            request_id=self.request_id,
            trace=self.trace,
        )


class AnswerUsage(msgspec.Struct, frozen=True):
    """Tokens of the prompt and of the whole answer, whoever wrote it."""

    prompt_tokens: int
    completion_tokens: int


class AnswerPart(msgspec.Struct, frozen=True):
    """Texts in order, and the tokens of the prompt before them; the last part has a `finish_reason` and `usage`, and the stop
    string that it was `stopped_by`, if one of the request's was. `index`: to which of a request's answers it belongs; where
    there are several, only the part that is the last of all has the usage. `logprobs`: of the texts' tokens, where asked for.
    `tool_calls`: parts of calls of functions, after the texts.
    """

    texts: list[str]
    finish_reason: AnswerEnd | None = None
    usage: AnswerUsage | None = None
    prompt_tokens: int = 0
    stopped_by: str | None = None
    index: int = 0
    logprobs: list[TokenLogprob] = []
    tool_calls: list[ToolCallDelta] = []


async def stream_answer(
    registry: WorkerRegistry,
    job: Job,
    *,
    wait_s: float,
    max_attempts: int,
    on_event: Callable[[AnswerEvent], None],
    hedging: Hedging | None = None,
    on_tried: Callable[[str], None] = lambda worker: None,
) -> AsyncGenerator[AnswerPart, None]:
    """The answer to `job`; `on_event` is called when it takes more than one worker. With `hedging` a second one may be asked.
    `on_tried` gets the identity of each worker that is asked for it, the one last that ends it.

    Raises `ApiError`: no worker, a request the worker refused, a failed engine, too many workers lost.
    """
    progress = _Progress(job)
    attempts = 0
    event: AnswerEvent | None = None
    failed: dict[str, Failure] = {}
    while attempts < max_attempts:
        if progress.is_full:
            # The last worker was lost between its last text and the word that it was the last.
            yield progress.ending("length")
            return
        if job.chat is not None and progress.has_begun:
            # What a call is in the middle of is known to nobody else.
            why = "an answer with tools does not go on with another one"
            raise _last_failure(failed) if event == "retried" else worker_lost(job.model, why)
        request = progress.request()
        tokens = registry.expected_tokens(job.model, request.sampling.max_tokens)
        needs = frozenset(request.needs())
        worker = await _next_worker(registry, progress.prefix, tokens, needs, wait_s, event, failed)
        if event is not None:
            on_event(event)
        hedge = None
        if hedging is not None and not progress.given:
            hedge = Hedge(registry, progress.prefix, tokens, needs, hedging.begin(job.model), on_event)
        race = Race(worker, request, tokens, hedge)
        on_tried(worker.identity)
        try:
            while True:
                pieces = await race.take()
                last = pieces[-1]
                texts = progress.add(pieces)
                logprobs = [one for piece in pieces for one in piece.logprobs]
                calls = [call for piece in pieces for call in piece.tool_calls]
                if texts or logprobs or calls:
                    yield AnswerPart(texts, prompt_tokens=progress.prompt_tokens, logprobs=logprobs, tool_calls=calls)
                if last.failure is not None and last.failure.kind == "engine_failed":
                    failed[race.worker.identity] = last.failure
                    attempts, event = attempts + 1, "retried"
                    break
                if last.failure is not None and last.failure.kind == "not_served":
                    # The model was withdrawn there while the request was on its way; nothing was lost.
                    attempts, event = attempts + 1, "continued" if progress.given else None
                    break
                if last.end is not None:
                    ending = progress.ending(_finish_reason(last), last.stopped_by)
                    if race.worker is not worker:
                        on_tried(race.worker.identity)
                    registry.note_answer(progress.prefix_after(), race.worker, progress.tokens)
                    yield ending
                    return
        except WorkerLostError:
            attempts, event = attempts + 1, "continued"
        except AnswerPausedError:
            event = "paused"
        finally:
            race.leave()
    if event == "retried":
        raise _last_failure(failed)
    raise worker_lost(job.model, f"so were the others that went on with this answer ({max_attempts} in all)")


async def _next_worker(
    registry: WorkerRegistry,
    prefix: Prefix,
    tokens: float,
    needs: frozenset[str],
    wait_s: float,
    event: AnswerEvent | None,
    failed: dict[str, Failure],
) -> RemoteWorker:
    """The worker to ask after `event`; `failed` are those whose engines failed at this answer. Raises `ApiError`: none."""
    if event == "retried":
        worker = registry.pick(prefix, tokens=tokens, needs=needs, avoid=failed)
        if worker is None:
            raise _last_failure(failed)
        return worker
    try:
        return await registry.acquire(prefix, tokens=tokens, needs=needs, wait_s=wait_s)
    except ApiError as error:
        if event is None or error.status == 404:
            raise
        raise worker_lost(prefix.model, f"no other one that can go on joined within {wait_s:g} s") from error


def _last_failure(failed: dict[str, Failure]) -> ApiError:
    return from_failure(list(failed.values())[-1])


class _Progress:
    """What of an answer has been given, whoever wrote it."""

    def __init__(self, job: Job) -> None:
        self.prefix = _prefix(job)
        self.given: list[str] = []
        self.tokens = self.prompt_tokens = 0
        self.has_begun = False
        self._job = job

    @property
    def is_full(self) -> bool:
        """Whether it may have no more tokens."""
        limit = self._job.sampling.max_tokens
        return limit is not None and self.tokens >= limit

    def request(self) -> Generate:
        """What a worker is asked for: all that is not given yet."""
        return self._job.request("".join(self.given), self.tokens)

    def add(self, pieces: list[Piece]) -> list[str]:
        """Count pieces; returns their texts."""
        texts = [piece.text for piece in pieces if piece.text]
        self.given.extend(texts)
        self.has_begun |= any(piece.text or piece.tool_calls for piece in pieces)
        self.tokens += sum(piece.tokens for piece in pieces)
        self.prompt_tokens = pieces[-1].prompt_tokens or self.prompt_tokens
        return texts

    def ending(self, finish_reason: AnswerEnd, stopped_by: str | None = None) -> AnswerPart:
        """The last part."""
        usage = AnswerUsage(self.prompt_tokens, self.tokens)
        return AnswerPart([], finish_reason, usage, self.prompt_tokens, stopped_by)

    def prefix_after(self) -> Prefix:
        """What the worker that gave the end has in its cache: the prompt and the answer."""
        answer = self._job.begun + "".join(self.given)
        return hash_prefix(self._job.model, [("assistant", answer)], before=self.prefix)


def _prefix(job: Job) -> Prefix:
    if job.chat is not None:
        said = [(message["role"], msgspec.json.encode(message).decode()) for message in job.chat.messages]
        return hash_prefix(job.model, [("", msgspec.json.encode(job.chat.tools).decode()), *said])
    if job.conversation is None:
        return hash_prefix(job.model, [("", one if isinstance(one, str) else repr(one)) for one in job.prompts[:1]])
    turns = [(turn.role, turn.content) for turn in job.conversation.messages if turn.content is not None]
    return hash_prefix(job.model, [("system", job.conversation.system or ""), *turns])


def _finish_reason(last: Piece) -> AnswerEnd:
    """Why the answer ended. Raises `ApiError` when it failed."""
    if last.failure is not None:
        raise from_failure(last.failure)
    if last.end == "stop" or last.end == "length" or last.end == "tool_calls":
        return last.end
    raise ApiError(500, f"the worker ended the answer as {last.end!r}.", kind="server_error", code="engine_failed")
