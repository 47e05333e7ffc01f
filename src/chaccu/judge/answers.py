"""`collect_answers`: the same questions to several models, at once and resumable.

Invariants: asked = answered + failed, turn by turn; an answer is written to the file before the next is asked of that
place in the queue, so a killed run loses only what was being written, and the next run asks only what is missing. An
answer on file counts for the same question, model, sampling and earlier turns only (its `key`). It ignores how good the
answers are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import BinaryIO

import msgspec

from chaccu.artifact import atomic_file, sha256_json, storage_errors
from chaccu.client import ChatClient, ChatDelta, ChatError, Sampling
from chaccu.conversation import Conversation, Message
from chaccu.errors import DataError
from chaccu.judge.questions import Question


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


async def collect_answers(
    client: ChatClient,
    models: Sequence[str],
    questions: Sequence[Question],
    *,
    sampling: Sampling | None = None,
    system: str | None = None,
    at_once: int = 1,
    file: Path | None = None,
    on_delta: OnDelta | None = None,
    on_done: OnDone | None = None,
) -> Asked:
    """Ask every question of every model, `at_once` questions of each model at a time.

    `file`: JSONL that holds earlier answers and takes the new ones; a last line that was cut off is dropped from it.
    `on_delta` gets (model, question, turn, delta) as the answer streams, `on_done` each answer or failure. A failed
    request is a `Failure`, not an error. Raises `StorageError` when the file cannot be written, `DataError` when it holds
    something else.
    """
    earlier = [] if file is None else _read_earlier(file)
    asking = _Asking(client, sampling or Sampling(), system, on_delta, on_done)
    asking.known = {answer.key: answer for answer in earlier}
    results: dict[tuple[int, int], list[Answer | Failure]] = {}
    async with AsyncExitStack() as stack:
        if file is not None:
            _write_answers(file, earlier)
            asking.out = stack.enter_context(_open_to_append(file))
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
        _write_answers(file, [*others, *asked.answers])
    return asked


def read_answers(file: Path) -> list[Answer]:
    """The answers of a JSONL file; a last line without its end is not read. Raises `StorageError`, `DataError`."""
    with storage_errors(file):
        data = file.read_bytes()
    decoder = msgspec.json.Decoder(Answer)
    answers = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            answers.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise DataError(
                f"line {number} of {file} is no answer: {error}.", remedy="take the line out, or write to another folder"
            ) from error
    return answers


def _read_earlier(file: Path) -> list[Answer]:
    return read_answers(file) if file.exists() else []


def _write_answers(file: Path, answers: Iterable[Answer]) -> None:
    with atomic_file(file) as whole:
        whole.writelines(msgspec.json.encode(answer) + b"\n" for answer in answers)


def _open_to_append(file: Path) -> BinaryIO:
    with storage_errors(file):
        return file.open("ab")


async def _work(
    asking: _Asking,
    model: str,
    column: int,
    queue: Iterable[tuple[int, Question]],
    results: dict[tuple[int, int], list[Answer | Failure]],
) -> None:
    for row, question in queue:
        results[row, column] = await asking.ask(model, question)


class _Asking:
    """What all requests of one run share."""

    def __init__(
        self,
        client: ChatClient,
        sampling: Sampling,
        system: str | None,
        on_delta: OnDelta | None,
        on_done: OnDone | None,
    ) -> None:
        self._client = client
        self._sampling = sampling
        self._system = system
        self._on_delta = on_delta
        self._on_done = on_done
        self.known: dict[str, Answer] = {}
        self.out: BinaryIO | None = None
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
        key = sha256_json([model, question.question_id, turn, conversation, self._sampling])
        if key in self.known:
            self.reused += 1
            return self.known[key]
        texts: list[str] = []
        first_token_s: float | None = None
        last = ChatDelta("")
        began_s = time.perf_counter()
        try:
            async with aclosing(self._client.stream_chat(model, conversation, self._sampling)) as stream:
                async for last in stream:
                    if last.text and first_token_s is None:
                        first_token_s = time.perf_counter() - began_s
                    texts.append(last.text)
                    if self._on_delta:
                        self._on_delta(model, question, turn, last)
        except ChatError as error:
            return Failure(
                question_id=question.question_id,
                turn=turn,
                model=model,
                cause=error.cause,
                message=error.message,
                remedy=error.remedy,
            )
        answer = Answer(
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
        self._keep(answer)
        return answer

    def _keep(self, answer: Answer) -> None:
        if self.out is None:
            return
        with storage_errors(Path(self.out.name)):
            self.out.write(msgspec.json.encode(answer) + b"\n")
            self.out.flush()
