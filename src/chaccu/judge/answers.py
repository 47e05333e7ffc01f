"""`collect_answers`: the same questions to several models, at once, through failures that pass, and resumable.

Invariants: asked = answered + failed, turn by turn; an answer is on the disk (fsync) before the next is asked of
that place in the queue, so a killed run loses only what was under way, and the next run asks only what is missing. An
answer on file counts for the same question, model, sampling and earlier turns only (its `key`). A model that has failed
several times in a row is not waited for any more. It ignores how good the answers are.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from pathlib import Path

import msgspec

from chaccu.artifact import sha256_json
from chaccu.client import ChatClient, ChatDelta, ChatError, Sampling
from chaccu.conversation import Conversation, Message
from chaccu.judge.json_lines import JsonLinesLog, read_json_lines, write_json_lines
from chaccu.judge.questions import Question
from chaccu.judge.retry import OF_THE_REQUEST, Clock, RetryPolicy


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One model's answer to one turn (from 0) of a question.

    `first_token_s` and `total_s` count from the sending of the request; `first_token_s` is None for an empty answer.
    `tokens`: as the server counts them, None if it does not say. `key`: SHA-256 of all that was asked.
    """

    question_id: int | str
    turn: int
    category: str
    model: str
    text: str
    first_token_s: float | None
    total_s: float
    tokens: int | None
    finish_reason: str
    key: str


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A turn without an answer. `cause`: a short name for counting; `message`, `remedy`: for people."""

    question_id: int | str
    turn: int
    model: str
    cause: str
    message: str
    remedy: str = ""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What became of every turn asked: `asked` = answers + failures. `reused` of the answers were on file already."""

    asked: int
    reused: int
    answers: list[Answer]
    failures: list[Failure]


OnDelta = Callable[[str, Question, int, ChatDelta], None]
OnDone = Callable[[Answer | Failure], None]
OnRetry = Callable[[str, Question, int, ChatError, float], None]

ONCE = RetryPolicy(tries=1)
# Turns that failed in a row, for all their tries, after which a model's turns are tried once each.
_GONE_AFTER = 3


async def collect_answers(
    client: ChatClient | Mapping[str, ChatClient],
    models: Sequence[str],
    questions: Sequence[Question],
    *,
    sampling: Sampling | None = None,
    system: str | None = None,
    at_once: int = 1,
    file: Path | None = None,
    retry: RetryPolicy = ONCE,
    clock: Clock | None = None,
    on_delta: OnDelta | None = None,
    on_done: OnDone | None = None,
    on_retry: OnRetry | None = None,
) -> Asked:
    """Ask every question of every model, `at_once` questions of each model at a time.

    `client`: of all models, or one for each by its name. `sampling`: without a temperature, each question has its own. `file`:
    JSONL that holds earlier answers and takes the new ones; a last line that was cut off is dropped from it. `retry`: what is
    asked again by itself. `on_delta` gets (model, question, turn, delta) as the answer streams, `on_done` each answer or
    failure, `on_retry` (model, question, turn, error, seconds to wait) before a turn is asked again: its deltas begin anew. A
    failed request is a `Failure`, not an error. Raises `StorageError` when the file cannot be written, `DataError` when it
    holds something else.
    """
    earlier = [] if file is None else _read_earlier(file)
    clients = dict.fromkeys(models, client) if isinstance(client, ChatClient) else client
    waiting = _Waiting(retry, clock or Clock(), on_retry)
    asking = _Asking(clients, sampling or Sampling(), system, waiting, on_delta, on_done)
    asking.known = {answer.key: answer for answer in earlier}
    results: dict[tuple[int, int], list[Answer | Failure]] = {}
    with ExitStack() as stack:
        if file is not None:
            asking.log = stack.enter_context(JsonLinesLog(file, earlier))
        try:
            async with asyncio.TaskGroup() as group:
                for column, model in enumerate(models):
                    queue = iter(enumerate(questions))
                    for _ in range(at_once):
                        group.create_task(_work(asking, model, column, queue, results))
        except ExceptionGroup as group_error:
            # One cause is enough: the others are the same full disk, or cancelled.
            raise group_error.exceptions[0] from None
    ordered = [one for place in sorted(results) for one in results[place]]
    asked = Asked(
        asked=len(models) * sum(len(question.turns) for question in questions),
        reused=asking.reused,
        answers=[one for one in ordered if isinstance(one, Answer)],
        failures=[one for one in ordered if isinstance(one, Failure)],
    )
    if file is not None:
        places = {(one.model, one.question_id, one.turn) for one in ordered}
        others = [one for one in earlier if (one.model, one.question_id, one.turn) not in places]
        write_json_lines(file, [*others, *asked.answers])
    return asked


def read_answers(file: Path) -> list[Answer]:
    """The answers of a JSONL file; a last line without its end is not read. Raises `StorageError`, `DataError`."""
    return read_json_lines(file, Answer, "answer", grows=True)


def _read_earlier(file: Path) -> list[Answer]:
    return read_answers(file) if file.exists() else []


async def _work(
    asking: _Asking,
    model: str,
    column: int,
    queue: Iterable[tuple[int, Question]],
    results: dict[tuple[int, int], list[Answer | Failure]],
) -> None:
    for row, question in queue:
        results[row, column] = await asking.ask(model, question)


class _Waiting:
    """How long which model is left alone after a failure."""

    def __init__(self, policy: RetryPolicy, clock: Clock, on_retry: OnRetry | None) -> None:
        self._policy = policy
        self._clock = clock
        self._on_retry = on_retry
        self._paused_until_s: dict[str, float] = {}
        self._failed_in_a_row: dict[str, int] = {}

    async def until_free(self, model: str) -> None:
        """Wait while the model's server wants to be left alone."""
        while (left_s := self._paused_until_s.get(model, -math.inf) - self._clock.now_s()) > 0:
            await self._clock.sleep(left_s)

    async def after(self, error: ChatError, tried: int, model: str, question: Question, turn: int) -> bool:
        """Wait after request number `tried` failed; False when the turn is not to be asked again."""
        gone = self._failed_in_a_row.get(model, 0) >= _GONE_AFTER
        wait_s = None if gone else self._policy.wait_s(error, tried, self._clock.draw())
        if wait_s is None:
            if not isinstance(error, OF_THE_REQUEST):
                self._failed_in_a_row[model] = self._failed_in_a_row.get(model, 0) + 1
            return False
        if self._on_retry:
            self._on_retry(model, question, turn, error, wait_s)
        if error.retry_after_s is not None:
            # What the server asks of one request holds for all.
            until_s = self._clock.now_s() + wait_s
            self._paused_until_s[model] = max(self._paused_until_s.get(model, until_s), until_s)
        else:
            await self._clock.sleep(wait_s)
        return True

    def note_answer(self, model: str) -> None:
        self._failed_in_a_row[model] = 0


class _Asking:
    """What all requests of one run share."""

    def __init__(
        self,
        clients: Mapping[str, ChatClient],
        sampling: Sampling,
        system: str | None,
        waiting: _Waiting,
        on_delta: OnDelta | None,
        on_done: OnDone | None,
    ) -> None:
        self._clients = clients
        self._sampling = sampling
        self._system = system
        self._waiting = waiting
        self._on_delta = on_delta
        self._on_done = on_done
        self.known: dict[str, Answer] = {}
        self.log: JsonLinesLog | None = None
        self.reused = 0

    async def ask(self, model: str, question: Question) -> list[Answer | Failure]:
        """All turns of one question; after a failure the later turns fail with it."""
        results: list[Answer | Failure] = []
        messages: list[Message] = []
        for turn, text in enumerate(question.turns):
            messages.append(Message("user", text))
            result: Answer | Failure
            if results and isinstance(results[-1], Failure):
                message = f"turn {turn} was not asked: the one before has no answer"
                result = Failure(
                    question_id=question.question_id, turn=turn, model=model, cause="earlier turn failed", message=message
                )
            else:
                result = await self._ask_turn(model, question, turn, messages)
            results.append(result)
            if isinstance(result, Answer):
                messages.append(Message("assistant", result.text))
            if self._on_done:
                self._on_done(result)
        return results

    async def _ask_turn(self, model: str, question: Question, turn: int, messages: list[Message]) -> Answer | Failure:
        conversation = Conversation(messages=tuple(messages), system=self._system)
        sampling = self._sampling
        if sampling.temperature is None:
            sampling = msgspec.structs.replace(sampling, temperature=question.temperature)
        key = sha256_json([model, question.question_id, turn, conversation, sampling])
        if key in self.known:
            self.reused += 1
            return self.known[key]
        tried = 0
        while True:
            await self._waiting.until_free(model)
            tried += 1
            try:
                answer = await self._send(model, question, turn, conversation, sampling, key)
            except ChatError as error:
                if await self._waiting.after(error, tried, model, question, turn):
                    continue
                return Failure(
                    question_id=question.question_id,
                    turn=turn,
                    model=model,
                    cause=error.cause,
                    message=error.message,
                    remedy=error.remedy,
                )
            self._waiting.note_answer(model)
            if self.log is not None:
                self.log.append([answer])
            return answer

    async def _send(
        self, model: str, question: Question, turn: int, conversation: Conversation, sampling: Sampling, key: str
    ) -> Answer:
        """One request. Raises `ChatError`."""
        texts: list[str] = []
        first_token_s: float | None = None
        last = ChatDelta("")
        began_s = time.perf_counter()
        async with aclosing(self._clients[model].stream_chat(model, conversation, sampling)) as stream:
            async for last in stream:
                if last.text and first_token_s is None:
                    first_token_s = time.perf_counter() - began_s
                texts.append(last.text)
                if self._on_delta:
                    self._on_delta(model, question, turn, last)
        return Answer(
            question_id=question.question_id,
            turn=turn,
            category=question.category,
            model=model,
            text="".join(texts),
            first_token_s=first_token_s,
            total_s=time.perf_counter() - began_s,
            tokens=last.usage.completion_tokens if last.usage else None,
            finish_reason=last.finish_reason or "",
            key=key,
        )
