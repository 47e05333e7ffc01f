"""`stream_answer`: one answer out of as many workers as it takes.

Invariants: the pieces it gives, joined, are one answer; when a worker vanishes, the next one goes on from exactly the text
already given, and its tokens are counted once; when the caller leaves, the worker is told at once. It ignores how the answer
is written to the client.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal

import msgspec

from chaccu.conversation import Conversation
from chaccu.serve.gateway.errors import ApiError, from_failure, worker_lost
from chaccu.serve.gateway.prefix_table import Prefix, hash_prefix
from chaccu.serve.gateway.registry import WorkerRegistry
from chaccu.serve.gateway.remote_worker import WorkerLostError
from chaccu.serve.link import Piece, Sampling


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked for. `begun`: a reply that the client itself has begun; it is not repeated in the answer. `n`: how
    many answers are wanted.
    """

    model: str
    sampling: Sampling
    conversation: Conversation | None = None
    prompt: str = ""
    begun: str = ""
    n: int = 1


class AnswerUsage(msgspec.Struct, frozen=True):
    """Tokens of the prompt and of the whole answer, whoever wrote it."""

    prompt_tokens: int
    completion_tokens: int


class AnswerPart(msgspec.Struct, frozen=True):
    """Texts in order, and the tokens of the prompt before them; the last part has a `finish_reason` and `usage`, and the stop
    string that it was `stopped_by`, if one of the request's was. `index`: to which of a request's answers it belongs; where
    there are several, only the part that is the last of all has the usage.
    """

    texts: list[str]
    finish_reason: Literal["stop", "length"] | None = None
    usage: AnswerUsage | None = None
    prompt_tokens: int = 0
    stopped_by: str | None = None
    index: int = 0


async def stream_answer(
    registry: WorkerRegistry, job: Job, *, wait_s: float, max_attempts: int, on_continue: Callable[[], None]
) -> AsyncGenerator[AnswerPart, None]:
    """The answer to `job`; `on_continue` is called when another worker goes on with it.

    Raises `ApiError`: no worker, a request the worker refused, a failed engine, too many workers lost.
    """
    given: list[str] = []
    tokens = prompt_tokens = 0
    prefix = _prefix(job)
    for attempt in range(max_attempts):
        limit = job.sampling.max_tokens
        if limit is not None and tokens >= limit:
            # The last worker was lost between its last text and the word that it was the last.
            yield AnswerPart([], "length", AnswerUsage(prompt_tokens, tokens), prompt_tokens)
            return
        begun = job.begun + "".join(given)
        sampling = job.sampling if limit is None else msgspec.structs.replace(job.sampling, max_tokens=limit - tokens)
        due_tokens = registry.expected_tokens(job.model, sampling.max_tokens)
        try:
            worker = await registry.acquire(prefix, tokens=due_tokens, wait_s=wait_s)
        except ApiError as error:
            if attempt == 0:
                raise
            raise worker_lost(job.model, f"no other one joined within {wait_s:g} s") from error
        if attempt:
            on_continue()
        number, answer = worker.open(
            job.model,
            conversation=job.conversation,
            prompt=job.prompt,
            begun=begun,
            sampling=sampling,
            due_tokens=due_tokens,
        )
        try:
            while True:
                pieces = await answer.take()
                texts = [piece.text for piece in pieces if piece.text]
                given.extend(texts)
                tokens += sum(piece.tokens for piece in pieces)
                prompt_tokens = pieces[-1].prompt_tokens or prompt_tokens
                if texts:
                    yield AnswerPart(texts, prompt_tokens=prompt_tokens)
                if pieces[-1].end is not None:
                    last = pieces[-1]
                    registry.note_answer(_prefix(job, prefix, given), worker, tokens)
                    usage = AnswerUsage(prompt_tokens, tokens)
                    yield AnswerPart([], _finish_reason(last), usage, prompt_tokens, last.stopped_by)
                    return
        except WorkerLostError:
            continue
        finally:
            worker.cancel(number)
    raise worker_lost(job.model, f"so were the others that went on with this answer ({max_attempts} in all)")


def _prefix(job: Job, asked: Prefix | None = None, given: Sequence[str] = ()) -> Prefix:
    """What a worker has read of `job` to answer it, and has in its cache then; behind `asked`, with the text it has given."""
    if asked is not None:
        return hash_prefix(job.model, [("assistant", job.begun + "".join(given))], before=asked)
    if job.conversation is None:
        return hash_prefix(job.model, [("", job.prompt)])
    turns = [(turn.role, turn.content) for turn in job.conversation.messages if turn.content is not None]
    return hash_prefix(job.model, [("system", job.conversation.system or ""), *turns])


def _finish_reason(last: Piece) -> Literal["stop", "length"]:
    """Why the answer ended. Raises `ApiError` when it failed."""
    if last.failure is not None:
        raise from_failure(last.failure)
    if last.end == "stop" or last.end == "length":
        return last.end
    raise ApiError(500, f"the worker ended the answer as {last.end!r}.", kind="server_error", code="engine_failed")
