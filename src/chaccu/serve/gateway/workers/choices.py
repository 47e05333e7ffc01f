"""`stream_choices`: the n answers to each prompt of one request, as parts in the order they come.

Invariants: each choice has a seed of its own, derived from the request's, so equal requests give equal answers; no more choices
are under way than `lanes`, and each takes its own turn at the workers, as n requests would; one that fails ends them all; the
tokens of a prompt are counted once, and the usage comes with the last part of all. It ignores how one choice is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterator

import msgspec

from chaccu.conversation import ToolCallDelta
from chaccu.serve.gateway.workers.answer import AnswerPart, AnswerUsage, Job
from chaccu.serve.gateway.workers.tool_calls import ToolCall, join_calls
from chaccu.serve.link import TokenLogprob

OpenAnswer = Callable[[Job], AsyncGenerator[AnswerPart, None]]


class WholeAnswer(msgspec.Struct):
    """One choice, once it is complete: its texts with the log-probabilities of their tokens, the parts of its calls, and its
    `last` part.
    """

    texts: list[str]
    logprobs: list[TokenLogprob]
    last: AnswerPart
    called: list[ToolCallDelta] = msgspec.field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The functions that are to be called."""
        return join_calls(self.called)


def derive_seed(seed: int | None, index: int) -> int | None:
    """The seed of choice `index` of a prompt: the request's own for the first, so that `n` does not change it; hashes for the
    others.
    """
    if seed is None or index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "big", signed=True)


async def stream_choices(job: Job, lanes: int, open_answer: OpenAnswer) -> AsyncGenerator[AnswerPart, None]:
    """The parts of all choices of `job`, each with its `index`, those to one prompt behind one another; at most `lanes` choices
    at once.

    Raises what the first choice that fails raises.
    """
    count = job.choices
    if count == 1:
        async with contextlib.aclosing(open_answer(job)) as parts:
            async for part in parts:
                yield part
        return
    lanes = max(1, min(lanes, count))
    # Bounded, so that a client that reads slowly holds up its own answers.
    came: asyncio.Queue[AnswerPart | Exception] = asyncio.Queue(maxsize=lanes)
    waiting = iter(range(count))
    tasks = [asyncio.create_task(_run_lane(job, waiting, open_answer, came)) for _ in range(lanes)]
    prompt_tokens: dict[int, int] = {}
    completion_tokens = ended = 0
    try:
        while ended < count:
            item = await came.get()
            if isinstance(item, Exception):
                raise item
            part = item
            if part.prompt_tokens:
                prompt_tokens[part.index // job.n] = part.prompt_tokens
            if part.usage is not None:
                ended += 1
                completion_tokens += part.usage.completion_tokens
                usage = AnswerUsage(sum(prompt_tokens.values()), completion_tokens) if ended == count else None
                part = msgspec.structs.replace(part, usage=usage)
            yield part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect_choices(parts: AsyncGenerator[AnswerPart, None]) -> tuple[list[WholeAnswer], AnswerUsage]:
    """All choices by their index, and what they used."""
    whole: dict[int, WholeAnswer] = {}
    usage = AnswerUsage(0, 0)
    async for part in parts:
        answer = whole.get(part.index)
        if answer is None:
            answer = whole[part.index] = WholeAnswer([], [], part)
        answer.texts.extend(part.texts)
        answer.logprobs.extend(part.logprobs)
        answer.called.extend(part.tool_calls)
        answer.last = part
        usage = part.usage or usage
    return [whole[index] for index in sorted(whole)], usage


async def _run_lane(
    job: Job, waiting: Iterator[int], open_answer: OpenAnswer, came: asyncio.Queue[AnswerPart | Exception]
) -> None:
    """Answer one choice after the other, as long as one waits."""
    try:
        for index in waiting:
            number, place = divmod(index, job.n)
            sampling = msgspec.structs.replace(job.sampling, seed=derive_seed(job.sampling.seed, place))
            alone = msgspec.structs.replace(job, sampling=sampling, n=1, prompts=job.prompts[number : number + 1])
            async with contextlib.aclosing(open_answer(alone)) as parts:
                async for part in parts:
                    await came.put(msgspec.structs.replace(part, index=index))
    except Exception as error:  # the one who reads the parts raises it
        await came.put(error)
