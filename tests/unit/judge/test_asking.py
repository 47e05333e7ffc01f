"""One judge against a server that misbehaves: every case ends in a verdict or in a failure that names it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from asking_fixtures import FastClock, comparisons, grades, session, settings

from chaccu.client import ChatClient, Sampling
from chaccu.judge.asking import (
    CUT_OFF,
    NOT_ASKED_AGAIN,
    SAME_AGAIN,
    AskSettings,
    JudgeChangedError,
    JudgeSession,
    JudgingFailure,
)
from chaccu.judge.budget import Budget, Price
from chaccu.judge.retry import RetryPolicy
from chaccu.judge.verdicts import Verdict
from chaccu.testing.scripted_judge import Reply, Script, ScriptedJudge

TASK = comparisons("a", "b")[0]
GOOD = Reply(text="Both were read. [[A]]", model="gpt-0613")


async def ask(
    script: Script, times: int = 1, timeout_s: float = 5.0, **others: Any
) -> tuple[list[Verdict | JudgingFailure], ScriptedJudge]:
    with ScriptedJudge(script) as server:
        async with ChatClient(server.url, timeout_s=timeout_s) as client:
            judge = session(client, **others)
            return [await judge.ask(TASK, "key") for _ in range(times)], server


def first(reply: Reply) -> Callable[[dict[str, Any], int], Reply]:
    """`reply` once, then a good one."""
    return lambda body, number: reply if number == 1 else GOOD


async def test_a_verdict_says_who_was_asked_what_and_answered() -> None:
    (verdict,), server = await ask(lambda body, number: GOOD)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.models, verdict.judge, verdict.judge_version) == ("first", ("a", "b"), "gpt", "gpt-0613")
    assert (verdict.prompt, verdict.prompt_sha256, verdict.key) == ("pair", TASK.prompt.sha256, "key")
    assert (verdict.attempts, verdict.prompt_tokens, verdict.answer_tokens, verdict.flags) == (1, 100, 10, ())
    (body,) = server.bodies
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["max_tokens"], body["temperature"]) == (50, 0.0)


async def test_a_grade_is_a_score() -> None:
    with ScriptedJudge(lambda body, number: Reply(text="Well. [[7.5]]")) as server:
        async with ChatClient(server.url) as client:
            verdict = await session(client).ask(grades("a")[0], "key")
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.scores, verdict.models) == (None, (7.5,), ("a",))


@pytest.mark.parametrize(
    ("reply", "waits"),
    [
        (Reply(status=500), [1.0]),
        (Reply(status=503), [1.0]),
        (Reply(how="reset"), [1.0]),
        (Reply(status=429), [1.0]),
        (Reply(status=429, headers={"retry-after": "17"}), [18.0]),
        (Reply(status=503, headers={"retry-after": "3"}), [4.0]),
        (Reply(how="garbage"), [1.0]),
        (Reply(how="half", text="Both were read. [[B]]"), [1.0]),
        (Reply(text=""), []),
    ],
)
async def test_failures_that_pass_are_asked_again(reply: Reply, waits: list[float]) -> None:
    clock = FastClock()
    (verdict,), server = await ask(first(reply), clock=clock)
    assert isinstance(verdict, Verdict), verdict
    assert (verdict.outcome, verdict.attempts, len(server.bodies)) == ("first", 2, 2)
    assert clock.slept == waits


async def test_a_silent_server_is_given_up_at_the_time_limit() -> None:
    (verdict,), server = await ask(first(Reply(how="silent")), timeout_s=0.2)
    assert isinstance(verdict, Verdict)
    assert (verdict.attempts, len(server.bodies)) == (2, 2)


@pytest.mark.parametrize(
    ("reply", "cause", "requests"),
    [
        (Reply(status=500), "server failed", 6),
        (Reply(how="reset"), "server unreachable", 6),
        (Reply(status=429), "limit reached", 6),
        (Reply(status=429, headers={"retry-after": "7200"}), "limit reached", 1),
        (Reply(status=401), "access denied", 1),
        (Reply(status=400), "request refused", 1),
        (Reply(status=400, code="context_length_exceeded"), "context full", 1),
        (Reply(how="garbage"), "invalid answer", 3),
        (Reply(how="half"), "invalid answer", 3),
        (Reply(text="  "), "empty answer", 3),
    ],
)
async def test_failures_that_stay_name_their_cause(reply: Reply, cause: str, requests: int) -> None:
    (failure,), server = await ask(lambda body, number: reply)
    assert isinstance(failure, JudgingFailure)
    assert (failure.cause, failure.attempts, len(server.bodies)) == (cause, requests, requests)
    assert failure.message


async def test_what_cannot_be_read_is_asked_again_with_other_seeds_and_kept_as_text() -> None:
    refusals = ["I cannot judge that.", "I would rather not.", "No."]
    sampled = AskSettings(sampling=Sampling(max_tokens=50, temperature=0.7, seed=5))
    (verdict,), server = await ask(lambda body, number: Reply(text=refusals[number - 1]), settings=sampled)
    assert isinstance(verdict, Verdict)
    assert not verdict.is_parsed
    assert (verdict.outcome, verdict.scores, verdict.text, verdict.attempts) == (None, None, "No.", 3)
    assert (verdict.prompt_tokens, verdict.answer_tokens) == (300, 30)
    assert [body["seed"] for body in server.bodies] == [5, 6, 7]


async def test_the_same_again_at_temperature_0_ends_the_asking() -> None:
    (verdict,), server = await ask(lambda body, number: Reply(text="I cannot judge."))
    assert isinstance(verdict, Verdict)
    assert (verdict.is_parsed, verdict.flags, len(server.bodies)) == (False, (SAME_AGAIN,), 2)


async def test_half_a_json_of_a_verdict_is_no_verdict() -> None:
    task = comparisons("a", "b", prompt="pair-json")[0]
    half = Reply(text='{"reason": "It is better", "winn', finish_reason="length")
    with ScriptedJudge(lambda body, number: half) as server:
        async with ChatClient(server.url) as client:
            verdict = await session(client).ask(task, "key")
    assert isinstance(verdict, Verdict)
    assert (verdict.is_parsed, verdict.flags) == (False, (CUT_OFF, SAME_AGAIN))


async def test_a_text_is_kept_when_the_next_request_fails() -> None:
    replies = [Reply(text="Hm."), Reply(status=400)]
    (verdict,), _ = await ask(lambda body, number: replies[number - 1])
    assert isinstance(verdict, Verdict)
    assert (verdict.text, verdict.is_parsed, verdict.flags) == ("Hm.", False, (NOT_ASKED_AGAIN,))


async def test_a_wait_that_the_server_asks_for_holds_for_all_requests() -> None:
    clock = FastClock()
    replies = [Reply(status=429, headers={"retry-after": "30"}), GOOD, GOOD]
    with ScriptedJudge(lambda body, number: replies[len(server.bodies) - 1]) as server:
        async with ChatClient(server.url) as client:
            judge = session(client, clock=clock)
            await judge.ask(TASK, "key")
            await judge.ask(TASK, "key")
    assert clock.slept == [31.0]


async def test_a_judge_that_is_gone_is_not_asked_for_every_task() -> None:
    quick = settings(retry=RetryPolicy(tries=1))
    failures, server = await ask(lambda body, number: Reply(status=500), times=9, settings=quick)
    assert [one.cause for one in failures if isinstance(one, JudgingFailure)] == ["server failed"] * 9
    assert len(server.bodies) == 6
    assert isinstance(failures[-1], JudgingFailure)
    assert (failures[-1].attempts, failures[-1].message[:32]) == (0, "gpt was not asked any more: http")
    _, server = await ask(lambda body, number: Reply(status=401), times=3)
    assert len(server.bodies) == 1


async def test_refused_requests_do_not_end_a_judge() -> None:
    results, server = await ask(lambda body, number: Reply(status=400) if number < 9 else GOOD, times=9)
    assert len(server.bodies) == 9
    assert isinstance(results[-1], Verdict)


async def test_a_judge_that_becomes_another_is_an_error() -> None:
    replies = [GOOD, Reply(text="[[A]]", model="gpt-1106")]
    with pytest.raises(JudgeChangedError, match=r"gpt was gpt-0613 before, and the server says gpt-1106"):
        await ask(lambda body, number: replies[number - 1], times=2)
    with pytest.raises(JudgeChangedError, match="was gpt-0301 before"):
        await ask(lambda body, number: GOOD, version="gpt-0301")


async def ask_json(script: Script, mode: str) -> tuple[list[Verdict | JudgingFailure], ScriptedJudge, JudgeSession]:
    tasks = comparisons("a", "b", prompt="pair-json")[:3]
    with ScriptedJudge(script) as server:
        async with ChatClient(server.url) as client:
            judge = session(client, settings=settings(structured=mode))
            return [await judge.ask(task, "key") for task in tasks], server, judge


@pytest.mark.parametrize(("mode", "sent"), [("auto", [True] * 3), ("on", [True] * 3), ("off", [False] * 3)])
async def test_a_schema_is_sent_where_it_is_wanted(mode: str, sent: list[bool]) -> None:
    results, server, judge = await ask_json(lambda body, number: Reply(text='{"reason": "x", "winner": "B"}'), mode)
    assert [one.outcome for one in results if isinstance(one, Verdict)] == ["second"] * 3
    assert ["response_format" in body for body in server.bodies] == sent
    assert judge.is_structured == (mode != "off")


async def test_an_endpoint_that_refuses_a_schema_is_asked_once_with_it() -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        return Reply(status=400) if "response_format" in body else Reply(text='{"winner": "A"}')

    results, server, judge = await ask_json(script, "auto")
    assert [one.outcome for one in results if isinstance(one, Verdict)] == ["first"] * 3
    assert ["response_format" in body for body in server.bodies] == [True, False, False, False]
    assert judge.is_structured is False
    results, server, _ = await ask_json(script, "on")
    assert [one.cause for one in results if isinstance(one, JudgingFailure)] == ["request refused"] * 3


async def test_a_request_that_is_refused_for_itself_says_nothing_of_the_schema() -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        return Reply(status=400) if len(server.bodies) <= 2 else Reply(text='{"winner": "A"}')

    tasks = comparisons("a", "b", prompt="pair-json")[:2]
    with ScriptedJudge(script) as server:
        async with ChatClient(server.url) as client:
            judge = session(client)
            results = [await judge.ask(task, "key") for task in tasks]
    assert [type(one) for one in results] == [JudgingFailure, Verdict]
    assert ["response_format" in body for body in server.bodies] == [True, False, True]
    assert judge.is_structured


async def test_spending_is_by_usage_and_a_request_that_does_not_fit_is_not_sent() -> None:
    price = Price(10_000.0, 0.0)  # one USD for the hundred tokens that the server says it reads
    budget = Budget(4.0)
    results, server = await ask(lambda body, number: GOOD, times=5, price=price, budget=budget, count_tokens=lambda texts: 150)
    assert [isinstance(one, Verdict) for one in results] == [True, True, True, False, False]
    assert (budget.spent_usd, len(server.bodies)) == (3.0, 3)
    assert isinstance(results[-1], JudgingFailure)
    assert (results[-1].cause, results[-1].message) == ("over budget", "it does not fit under the cap of 4 USD")


async def test_without_usage_the_own_count_is_the_cost() -> None:
    budget = Budget(10.0)
    silent = Reply(text="[[A]]", usage=None)
    (verdict,), _ = await ask(
        lambda body, number: silent, price=Price(10_000.0, 0.0), budget=budget, count_tokens=lambda texts: 150
    )
    assert isinstance(verdict, Verdict)
    assert (verdict.prompt_tokens, budget.spent_usd) == (None, 1.5)


async def test_what_may_have_been_written_counts_as_paid() -> None:
    budget = Budget(10.0)
    await ask(
        first(Reply(how="silent")), timeout_s=0.2, price=Price(10_000.0, 0.0), budget=budget, count_tokens=lambda texts: 150
    )
    assert budget.spent_usd == 2.5


@pytest.mark.parametrize(
    ("reply", "spent_usd"),
    [(Reply(how="reset"), 2.5), (Reply(how="half"), 2.5), (Reply(status=500), 1.0), (Reply(status=429), 1.0)],
)
async def test_only_what_the_server_may_have_worked_on_is_paid(reply: Reply, spent_usd: float) -> None:
    budget = Budget(10.0)
    await ask(first(reply), price=Price(10_000.0, 0.0), budget=budget, count_tokens=lambda texts: 150)
    assert budget.spent_usd == spent_usd


async def test_a_count_that_was_too_low_is_not_trusted_again() -> None:
    # Ten tokens are counted where the server reads a hundred, which cost 1 USD.
    budget = Budget(3.5)
    results, server = await ask(
        lambda body, number: GOOD, times=5, price=Price(10_000.0, 0.0), budget=budget, count_tokens=lambda texts: 10
    )
    assert [isinstance(one, Verdict) for one in results] == [True, True, True, False, False]
    assert (budget.spent_usd, len(server.bodies)) == (3.0, 3)


async def test_the_cap_is_exceeded_by_no_more_than_what_is_under_way_was_counted_too_low() -> None:
    budget = Budget(3.5)
    with ScriptedJudge(lambda body, number: GOOD) as server:
        async with ChatClient(server.url) as client:
            judge = session(client, price=Price(10_000.0, 0.0), budget=budget, count_tokens=lambda texts: 10)
            await asyncio.gather(*(judge.ask(TASK, "key") for _ in range(12)))
            # All twelve were counted as 0.1 USD and cost 1 USD; what comes behind them is not sent.
            assert isinstance(await judge.ask(TASK, "key"), JudgingFailure)
    assert len(server.bodies) == budget.spent_usd == 12


@pytest.mark.parametrize("reason", ["length", "content_filter"])
async def test_a_text_that_was_cut_off_states_what_it_ends_with_and_is_flagged(reason: str) -> None:
    (verdict,), _ = await ask(lambda body, number: Reply(text="Both are good.\n[[A]]", finish_reason=reason))
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.flags) == ("first", (CUT_OFF,))
    (verdict,), _ = await ask(lambda body, number: Reply(text="Both are good. [[A]] And", finish_reason=reason))
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.flags) == (None, (CUT_OFF, SAME_AGAIN))


async def test_a_refusal_is_kept_as_the_text_of_an_unparsed_verdict() -> None:
    (verdict,), _ = await ask(lambda body, number: Reply(refusal="I cannot judge that."))
    assert isinstance(verdict, Verdict)
    assert (verdict.is_parsed, verdict.text) == (False, "I cannot judge that.")


async def test_waits_are_told_and_none_comes_after_the_last_request() -> None:
    said: list[tuple[str, str, float]] = []
    clock = FastClock()
    await ask(
        first(Reply(status=429, headers={"retry-after": "17"})),
        clock=clock,
        on_retry=lambda judge, error, wait_s: said.append((judge, error.cause, wait_s)),
    )
    assert said == [("gpt", "limit reached", 18.0)]
    clock = FastClock()
    await ask(lambda body, number: Reply(how="garbage"), clock=clock)
    assert clock.slept == [1.0, 2.0]
