"""What a page keeps of a conversation, and how answers end in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chaccu.client import ChatClient, Sampling
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.web.messages import render_messages, turn_at
from chaccu.web.transcript import Transcript, Turn, messages_to_ask, stopped, stream_turn


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI({}) as fake:
        yield fake


async def states_of(server: FakeOpenAI, turns: Transcript, system: str = "") -> list[Turn]:
    async with ChatClient(server.url) as client:
        streamed = stream_turn(client, turns, system=system, sampling=Sampling(max_tokens=9), show_every_s=0)
        return [state[-1] async for state in streamed]


async def test_an_answer_grows_and_ends_with_its_facts(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel(answer="one two three")}
    states = await states_of(server, (Turn(prompt="Count.", model="tuned"),), system=" Be brief. ")
    assert [state.answer for state in states[:3]] == ["one", "one two", "one two three"]
    last = states[-1]
    assert (last.state, last.finish_reason, last.tokens) == ("done", "stop", 3)
    assert last.total_s is not None
    assert last.first_text_s is not None
    assert last.first_text_s <= last.total_s
    assert server.requests[-1]["messages"][0] == {"role": "system", "content": "Be brief."}


async def test_a_failure_keeps_what_came_and_names_cause_and_model(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel(answer="one two three", failure="worker_lost", fail_after=2)}
    last = (await states_of(server, (Turn(prompt="Count.", model="tuned"),)))[-1]
    assert (last.state, last.answer, last.cause) == ("failed", "one two", "worker lost")
    assert "The worker of 'tuned' was lost" in last.error
    foot = render_messages((last,))[-1]
    assert foot["metadata"]["title"] == "tuned · worker lost"
    assert "worker of 'tuned' was lost" in foot["content"][0]["text"]


def test_unanswered_turns_are_not_sent_again() -> None:
    turns = (
        Turn(prompt="a", model="x", state="done", answer="A"),
        Turn(prompt="b", model="x", state="failed", error="gone"),
        Turn(prompt="c", model="y"),
    )
    assert messages_to_ask(turns) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "c"},
    ]


def test_stopping_marks_a_running_answer_only() -> None:
    done, running = (
        Turn(prompt="a", model="x", state="done", answer="A"),
        Turn(prompt="b", model="x", state="writing", answer="B"),
    )
    assert stopped((done, running))[-1].state == "stopped"
    assert stopped((done, running))[-1].answer == "B"
    assert stopped((done,)) == (done,)
    assert stopped(()) == ()


def test_messages_find_their_turn_and_names_are_no_markup() -> None:
    turns = (
        Turn(prompt="a", model="org/my_model*", state="failed", cause="time-out", error="<b>silent</b>"),
        Turn(prompt="b", model="x", state="done", answer="B"),
    )
    messages = render_messages(turns)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "assistant"]
    assert [turn_at(turns, index) for index in range(6)] == [0, 0, 1, 1, 1, 1]
    assert messages[1]["metadata"]["title"] == "org/my\\_model\\* · time-out"
    assert messages[1]["content"][0]["text"] == "\\<b\\>silent\\</b\\>"
