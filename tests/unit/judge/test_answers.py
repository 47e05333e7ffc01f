from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking_fixtures import FastClock

from chaccu.client import ChatClient, ChatDelta, Sampling
from chaccu.errors import DataError, StorageError
from chaccu.judge import Answer, Asked, Failure, Question, collect_answers, read_answers
from chaccu.judge.retry import RetryPolicy
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI

QUESTIONS = [
    Question(1, "knowledge", ("What is a vicuña?",)),
    Question(2, "writing", ("Write a line.", "Now shorter.")),
    Question(3, "math", ("1 + 1?",)),
]


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI({"base": FakeModel(answer="A small camel."), "tuned": FakeModel(answer="It is me.")}) as server:
        yield server


def ask(server: FakeOpenAI, *models: str, **options: Any) -> Asked:
    async def run() -> Asked:
        async with ChatClient(server.url, timeout_s=10) as client:
            return await collect_answers(client, models, QUESTIONS, **options)

    return asyncio.run(run())


def test_every_turn_of_every_model_is_answered_in_order(server: FakeOpenAI) -> None:
    asked = ask(server, "base", "tuned", at_once=2)
    assert (asked.asked, len(asked.answers), asked.failures, asked.reused) == (8, 8, [], 0)
    assert [(one.question_id, one.model, one.turn) for one in asked.answers] == [
        (1, "base", 0),
        (1, "tuned", 0),
        (2, "base", 0),
        (2, "base", 1),
        (2, "tuned", 0),
        (2, "tuned", 1),
        (3, "base", 0),
        (3, "tuned", 0),
    ]
    first = asked.answers[0]
    assert (first.text, first.category, first.finish_reason, first.tokens) == ("A small camel.", "knowledge", "stop", 3)
    assert first.first_token_s is not None
    assert 0 < first.first_token_s <= first.total_s
    last_turn = next(body for body in server.requests if body["messages"][-1]["content"] == "Now shorter.")
    assert [message["role"] for message in last_turn["messages"]] == ["user", "assistant", "user"]


def test_deltas_stream_and_add_up(server: FakeOpenAI) -> None:
    pieces: dict[tuple[str, Any, int], str] = {}

    def on_delta(model: str, question: Question, turn: int, delta: ChatDelta) -> None:
        place = (model, question.question_id, turn)
        pieces[place] = pieces.get(place, "") + delta.text

    done: list[Answer | Failure] = []
    asked = ask(server, "base", on_delta=on_delta, on_done=done.append)
    assert pieces == {(one.model, one.question_id, one.turn): one.text for one in asked.answers}
    assert len(done) == asked.asked


def test_failures_are_counted_and_named_and_asked_again(server: FakeOpenAI, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    server.models["tuned"].failure = "worker_lost"
    server.models["tuned"].fail_after = 1
    asked = ask(server, "base", "tuned", file=file)
    assert asked.asked == 8 == len(asked.answers) + len(asked.failures)
    assert [(one.question_id, one.turn, one.cause) for one in asked.failures] == [
        (1, 0, "worker lost"),
        (2, 0, "worker lost"),
        (2, 1, "earlier turn failed"),
        (3, 0, "worker lost"),
    ]
    assert "tuned" in asked.failures[0].message
    assert all(one.model == "base" for one in read_answers(file))
    server.models["tuned"].failure = None
    server.requests.clear()
    again = ask(server, "base", "tuned", file=file)
    assert (again.asked, len(again.answers), again.failures, again.reused) == (8, 8, [], 4)
    assert {body["model"] for body in server.requests} == {"tuned"}
    assert read_answers(file) == again.answers


def test_other_sampling_or_system_text_is_another_question(server: FakeOpenAI, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    ask(server, "base", file=file)
    assert ask(server, "base", file=file).reused == 4
    assert ask(server, "base", file=file, sampling=Sampling(temperature=1.0)).reused == 0
    assert ask(server, "base", file=file, system="Be brief.").reused == 0
    assert len(read_answers(file)) == 4
    ask(server, "tuned", file=file)
    assert {one.model for one in read_answers(file)} == {"base", "tuned"}


def test_a_line_that_was_cut_off_is_asked_again(server: FakeOpenAI, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    whole = ask(server, "base", file=file)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 20])
    again = ask(server, "base", file=file)
    assert again.reused == 3
    assert [one.text for one in read_answers(file)] == [one.text for one in whole.answers]


def test_a_file_of_something_else_is_refused(server: FakeOpenAI, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"line 1 of .* is no answer"):
        ask(server, "base", file=tmp_path / "answers.jsonl")
    assert server.requests == []


def test_no_more_than_at_once_are_under_way(server: FakeOpenAI) -> None:
    under_way, most = 0, 0
    stream_chat = ChatClient.stream_chat

    class Counting(ChatClient):
        async def stream_chat(self, *arguments: Any) -> Any:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            async for delta in stream_chat(self, *arguments):
                yield delta
            under_way -= 1

    async def run() -> Asked:
        async with Counting(server.url) as client:
            return await collect_answers(client, ["base"], [Question(n, "math", ("?",)) for n in range(9)], at_once=3)

    server.models["base"].delay_s = 0.005
    assert len(asyncio.run(run()).answers) == 9
    assert most == 3


def test_each_question_is_asked_with_its_own_temperature(server: FakeOpenAI) -> None:
    async def run(sampling: Sampling) -> None:
        questions = [Question(1, "math", ("1?",), temperature=0.0), Question(2, "writing", ("2?",), temperature=0.7)]
        async with ChatClient(server.url) as client:
            await collect_answers(client, ["base"], [*questions, Question(3, "other", ("3?",))], sampling=sampling)

    asyncio.run(run(Sampling()))
    assert [body.get("temperature") for body in server.requests] == [0.0, 0.7, None]
    server.requests.clear()
    asyncio.run(run(Sampling(temperature=0.3)))
    assert [body.get("temperature") for body in server.requests] == [0.3, 0.3, 0.3]


def test_models_at_several_servers(server: FakeOpenAI) -> None:
    async def run(other: FakeOpenAI) -> Asked:
        async with ChatClient(server.url) as here, ChatClient(other.url) as there:
            return await collect_answers({"base": here, "far": there}, ["base", "far"], QUESTIONS)

    with FakeOpenAI({"far": FakeModel(answer="From afar.")}) as other:
        asked = asyncio.run(run(other))
        assert (len(asked.answers), asked.failures) == (8, [])
        assert {body["model"] for body in other.requests} == {"far"}
        assert {body["model"] for body in server.requests} == {"base"}


@pytest.mark.parametrize(("failure", "fail_after"), [("failed", 0), ("limit", 0), ("no_worker", 0), ("worker_lost", 1)])
def test_failures_that_pass_are_asked_again(server: FakeOpenAI, failure: Any, fail_after: int) -> None:
    model = server.models["base"]
    model.failure, model.fail_after, model.failures_left = failure, fail_after, 2
    clock, said = FastClock(chance=0.0), []
    asked = ask(server, "base", retry=RetryPolicy(), clock=clock, on_retry=lambda *one: said.append(one[-1]))
    assert (len(asked.answers), asked.failures) == (4, [])
    assert {one.text for one in asked.answers} == {"A small camel."}
    assert clock.slept == said == [0.5, 1.0]
    assert len(server.requests) == 4 + 2


def test_a_server_is_left_alone_for_as_long_as_it_asks(server: FakeOpenAI) -> None:
    model = server.models["base"]
    model.failure, model.failures_left, model.retry_after = "limit", 1, "7"
    clock = FastClock(chance=0.0)
    assert ask(server, "base", retry=RetryPolicy(), clock=clock).failures == []
    assert clock.slept == [7.0]


def test_failures_that_do_not_pass_are_not_asked_again(server: FakeOpenAI) -> None:
    server.models["base"].failure = "context"
    clock = FastClock(chance=0.0)
    asked = ask(server, "base", retry=RetryPolicy(), clock=clock)
    assert [one.cause for one in asked.failures] == ["context full"] * 2 + ["earlier turn failed", "context full"]
    assert (clock.slept, len(server.requests)) == ([], 3)


def test_a_model_that_is_gone_is_not_waited_for(server: FakeOpenAI) -> None:
    server.models["base"].failure = "failed"

    async def run() -> Asked:
        questions = [Question(number, "math", ("?",)) for number in range(6)]
        async with ChatClient(server.url) as client:
            return await collect_answers(client, ["base"], questions, retry=RetryPolicy(tries=3), clock=FastClock(chance=0.0))

    assert len(asyncio.run(run()).failures) == 6
    # Three questions three times each, and the others once.
    assert len(server.requests) == 3 * 3 + 3


def test_a_lost_connection_is_a_failure_that_passes() -> None:
    async def run() -> tuple[Asked, FastClock]:
        clock = FastClock(chance=0.0)
        async with ChatClient("http://127.0.0.1:9") as client:
            asked = await collect_answers(client, ["base"], QUESTIONS[:1], retry=RetryPolicy(tries=2), clock=clock)
        return asked, clock

    asked, clock = asyncio.run(run())
    assert [one.cause for one in asked.failures] == ["server unreachable"]
    assert clock.slept == [0.5]


def test_requests_that_are_refused_for_themselves_do_not_end_a_model(server: FakeOpenAI) -> None:
    # Four conversations that are too long, then a server that fails once: it is asked again.
    model = server.models["base"]
    model.failure, model.failures_left = "context", 4
    clock = FastClock(chance=0.0)

    def on_done(result: Answer | Failure) -> None:
        if result.question_id == 3 and isinstance(result, Failure):
            model.failure, model.failures_left = "failed", 1

    async def run() -> Asked:
        questions = [Question(number, "math", ("?",)) for number in range(6)]
        async with ChatClient(server.url) as client:
            return await collect_answers(client, ["base"], questions, retry=RetryPolicy(tries=2), clock=clock, on_done=on_done)

    asked = asyncio.run(run())
    assert [one.cause for one in asked.failures] == ["context full"] * 4
    assert (len(asked.answers), clock.slept) == (2, [0.5])


def test_a_full_disk_is_named_and_costs_no_answer_that_was_written(
    server: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.jsonl"
    sync = os.fsync

    def fill_up(descriptor: int) -> None:
        if file.exists() and file.stat().st_size > 400:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_up)
    with pytest.raises(StorageError, match=r"no space left while writing .*answers\.jsonl"):
        ask(server, "base", file=file)
    monkeypatch.undo()
    had = len(read_answers(file))
    assert 0 < had < 4
    assert ask(server, "base", file=file).reused == had
