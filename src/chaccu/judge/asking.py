"""`JudgeSession`: one judge in one run, asked until its text can be read or there is reason to stop.

Invariants: every task ends in a verdict, parsed or not, or in a `JudgingFailure` that names its cause; no text is taken for a
number that does not state one. A judge that answers under another name than before is an error, for its verdicts would be
another's. A judge that is gone is not asked for every task anew. It ignores what is on file already.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from chaccu.client import (
    AccessDeniedError,
    ChatClient,
    ChatError,
    Completion,
    InvalidAnswerError,
    RequestRefusedError,
    Sampling,
    UnknownModelError,
)
from chaccu.conversation import Conversation
from chaccu.errors import ChaccuError
from chaccu.judge.budget import Budget, CountTokens, Price, count_by_bytes, count_prompt
from chaccu.judge.flags import CUT_REASONS
from chaccu.judge.judges import Judge
from chaccu.judge.parsing import read_outcome, read_scores
from chaccu.judge.retry import OF_THE_REQUEST, Clock, RetryPolicy
from chaccu.judge.tasks import JudgeTask, Structured
from chaccu.judge.verdicts import Verdict

OnRetry = Callable[[str, ChatError, float], None]
"""Gets the judge's name, what went wrong and the seconds to wait before a request is sent again."""

OVER_BUDGET = "over budget"
NO_ANSWER = "no answer"

# Flags of the judge's text; the others are of the answers.
CUT_OFF = "judge cut off"
SAME_AGAIN = "judge says the same again"
NOT_ASKED_AGAIN = "judge not asked again"
OF_THE_JUDGE = (CUT_OFF, SAME_AGAIN, NOT_ASKED_AGAIN)

# Failed tasks in a row after which a judge is taken for gone.
_GONE_AFTER = 6


class JudgeChangedError(ChaccuError):
    """A judge answered under another model's name than before."""


class _EmptyAnswerError(ChatError):
    """The judge wrote nothing."""

    cause = "empty answer"


class JudgingFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A task without a verdict. `cause`: a short name for counting; `message`, `remedy`: for people."""

    question_id: int | str
    category: str
    turn: int | None
    models: tuple[str, ...]
    judge: str
    prompt: str
    cause: str
    message: str
    remedy: str = ""
    attempts: int = 0


class AskSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`again`: how often an answer that cannot be read is asked for again, each time with the next seed."""

    sampling: Sampling
    again: int = 2
    structured: Structured = "auto"
    retry: RetryPolicy = RetryPolicy()


class _Tally:
    """What one task has taken so far."""

    def __init__(self) -> None:
        self.attempts = 0
        self.prompt_tokens: int | None = None
        self.answer_tokens: int | None = None

    def add(self, completion: Completion) -> None:
        if completion.usage is not None:
            self.prompt_tokens = (self.prompt_tokens or 0) + completion.usage.prompt_tokens
            self.answer_tokens = (self.answer_tokens or 0) + completion.usage.completion_tokens


class _OverBudgetError(Exception):
    """The next request does not fit under the cap."""


class JudgeSession:
    """One judge, whom any number of tasks may ask at a time."""

    def __init__(
        self,
        judge: Judge,
        client: ChatClient,
        settings: AskSettings,
        *,
        budget: Budget | None = None,
        version: str | None = None,
        count_tokens: CountTokens = count_by_bytes,
        clock: Clock | None = None,
        on_retry: OnRetry | None = None,
    ) -> None:
        """`version`: the name under which the judge has answered before, if it has."""
        self.judge = judge
        self.settings = settings
        self.version = version
        self.count_tokens = count_tokens
        self._client = client
        self._budget = budget or Budget()
        self._clock = clock or Clock()
        self._on_retry = on_retry
        # How many times more tokens than were counted a prompt has had, at most.
        self._undercount = 1.0
        self._paused_until_s = float("-inf")
        self._is_structured = {"auto": None, "on": True, "off": False}[settings.structured]
        self._first_structured = asyncio.Lock()
        self._failed_in_a_row = 0
        self._gone: ChatError | None = None

    @property
    def is_structured(self) -> bool | None:
        """Whether the endpoint holds answers to a schema; None while no prompt with one has been sent."""
        return self._is_structured

    def check_version(self, name: str | None, source: str) -> None:
        """Take `name`, as `source` gives it, for the judge's, or raise `JudgeChangedError` where it has another already."""
        if name is None or name == self.version:
            return
        if self.version is not None:
            raise JudgeChangedError(
                f"the judge {self.judge.name} was {self.version} before, and {source} says {name}: "
                "verdicts of two models do not belong together.",
                remedy="name the exact model with --judge, or begin another folder with another --cache",
            )
        self.version = name

    async def ask(self, task: JudgeTask, key: str) -> Verdict | JudgingFailure:
        """The judge's verdict on a task. Raises `JudgeChangedError`."""
        if self._gone is not None:
            message = f"{self.judge.name} was not asked any more: {self._gone.message}"
            return self.fail(task, self._gone.cause, message, self._gone.remedy)
        tally = _Tally()
        try:
            completion, is_read, flags = await self._ask_until_read(task, tally)
        except _OverBudgetError:
            cap = f"{self._budget.cap_usd:g}"
            return self.fail(task, OVER_BUDGET, f"it does not fit under the cap of {cap} USD", "a higher --max-cost", tally)
        except ChatError as error:
            self._note_failure(error)
            return self.fail(task, error.cause, error.message, error.remedy, tally)
        self._failed_in_a_row = 0
        return Verdict(
            key=key,
            question_id=task.question.question_id,
            category=task.question.category,
            turn=task.turn,
            models=task.models,
            judge=self.judge.name,
            judge_version=completion.model,
            prompt=task.prompt.name,
            prompt_sha256=task.prompt.sha256,
            outcome=read_outcome(completion.text, task.prompt, completion.finish_reason) if is_read else None,
            scores=read_scores(completion.text, task.prompt, completion.finish_reason) if is_read else None,
            text=completion.text,
            finish_reason=completion.finish_reason,
            attempts=tally.attempts,
            flags=(*task.flags, *flags),
            prompt_tokens=tally.prompt_tokens,
            answer_tokens=tally.answer_tokens,
        )

    def fail(self, task: JudgeTask, cause: str, message: str, remedy: str = "", tally: _Tally | None = None) -> JudgingFailure:
        """That this judge gives no verdict on `task`."""
        return JudgingFailure(
            question_id=task.question.question_id,
            category=task.question.category,
            turn=task.turn,
            models=task.models,
            judge=self.judge.name,
            prompt=task.prompt.name,
            cause=cause,
            message=message,
            remedy=remedy,
            attempts=tally.attempts if tally else 0,
        )

    def _note_failure(self, error: ChatError) -> None:
        if isinstance(error, OF_THE_REQUEST):
            return
        self._failed_in_a_row += 1
        if isinstance(error, (AccessDeniedError, UnknownModelError)) or self._failed_in_a_row >= _GONE_AFTER:
            self._gone = error

    async def _ask_until_read(self, task: JudgeTask, tally: _Tally) -> tuple[Completion, bool, tuple[str, ...]]:
        """The first answer that can be read, else the last with a text; whether it can be read; its flags."""
        unread: Completion | None = None
        error: ChatError | None = None
        flags: list[str] = []
        for again in range(self.settings.again + 1):
            sampling = self._sampling(again)
            try:
                completion = await self._send(task, sampling, tally)
            except InvalidAnswerError as invalid:
                error = invalid
                if again < self.settings.again:
                    await self._clock.sleep(self.settings.retry.step_s(again + 1, self._clock.draw()))
                continue
            except (_OverBudgetError, ChatError) as failed:
                if unread is not None:
                    # Its text counts for now; the next run asks anew.
                    flags.append(NOT_ASKED_AGAIN)
                    break
                raise failed
            self.check_version(completion.model, "the server")
            if _can_be_read(completion, task):
                return completion, True, _flags_of(completion)
            if not completion.text.strip():
                message = f"{self.judge.name} wrote nothing ({completion.finish_reason})"
                error = _EmptyAnswerError(message, remedy="allow more tokens, or ask another judge", model=self.judge.name)
                continue
            repeats = unread is not None and unread.text == completion.text
            unread = completion
            if repeats and not sampling.temperature:
                # The likeliest tokens come again, whatever the seed.
                flags.append(SAME_AGAIN)
                break
        if unread is None:
            assert error is not None
            raise error
        return unread, False, (*_flags_of(unread), *flags)

    def _sampling(self, again: int) -> Sampling:
        sampling = self.settings.sampling
        return msgspec.structs.replace(sampling, seed=(sampling.seed or 0) + again) if again else sampling

    async def _send(self, task: JudgeTask, sampling: Sampling, tally: _Tally) -> Completion:
        """One answer, through failures that pass. Raises `ChatError` for those that do not."""
        tried = 0
        while True:
            while (left_s := self._paused_until_s - self._clock.now_s()) > 0:
                await self._clock.sleep(left_s)
            tried += 1
            try:
                return await self._send_structured(task, sampling, tally)
            except ChatError as error:
                wait_s = self.settings.retry.wait_s(error, tried, self._clock.draw())
                if wait_s is None:
                    raise
                if self._on_retry:
                    self._on_retry(self.judge.name, error, wait_s)
                if error.retry_after_s is None:
                    await self._clock.sleep(wait_s)
                else:
                    # What the server asks of one request holds for all.
                    self._paused_until_s = max(self._paused_until_s, self._clock.now_s() + wait_s)

    async def _send_structured(self, task: JudgeTask, sampling: Sampling, tally: _Tally) -> Completion:
        """With the prompt's schema, where the endpoint takes it: the first request goes alone, to find that out."""
        schema = task.prompt.response_format
        if schema is not None and self._is_structured is None:
            async with self._first_structured:
                if self._is_structured is None:
                    return await self._find_out_structured(task, sampling, tally, schema)
        return await self._post(task, sampling, tally, schema if self._is_structured else None)

    async def _find_out_structured(
        self, task: JudgeTask, sampling: Sampling, tally: _Tally, schema: Mapping[str, Any]
    ) -> Completion:
        """What is refused with the schema and taken without it tells that the schema is to blame."""
        try:
            completion = await self._post(task, sampling, tally, schema)
        except RequestRefusedError:
            completion = await self._post(task, sampling, tally, None)
            self._is_structured = False
        else:
            self._is_structured = True
        return completion

    async def _post(
        self, task: JudgeTask, sampling: Sampling, tally: _Tally, response_format: Mapping[str, Any] | None
    ) -> Completion:
        messages = task.messages()
        prompt_tokens = count_prompt(self.count_tokens, task.prompt.system, messages)
        price = self.judge.price or Price(0.0, 0.0)
        most_usd = price.cost_usd(math.ceil(prompt_tokens * self._undercount), sampling.max_tokens or 0)
        if not await self._budget.reserve(most_usd):
            raise _OverBudgetError
        cost_usd = 0.0
        tally.attempts += 1
        try:
            conversation = Conversation(messages=messages, system=task.prompt.system)
            completion = await self._client.complete_chat(
                self.judge.name, conversation, sampling, response_format=response_format
            )
            tally.add(completion)
            if completion.usage is not None:
                cost_usd = price.cost_usd(completion.usage.prompt_tokens, completion.usage.completion_tokens)
                # Whoever counts one prompt too low does so with the next: from here on the cap holds all the same.
                self._undercount = max(self._undercount, completion.usage.prompt_tokens / max(1, prompt_tokens))
            else:
                cost_usd = price.cost_usd(prompt_tokens, self.count_tokens([completion.text]))
        except ChatError as error:
            # Nobody has said what a lost answer costs.
            cost_usd = most_usd if error.was_taken else 0.0
            raise
        finally:
            self._budget.settle(most_usd, cost_usd)
        return completion


def _can_be_read(completion: Completion, task: JudgeTask) -> bool:
    read = read_outcome if task.prompt.kind == "pairwise" else read_scores
    return read(completion.text, task.prompt, completion.finish_reason) is not None


def _flags_of(completion: Completion) -> tuple[str, ...]:
    return (CUT_OFF,) if completion.finish_reason in CUT_REASONS else ()
