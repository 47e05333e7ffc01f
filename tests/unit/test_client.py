"""The chat client: whole answers, and one plain message for each way an answer can fail."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from chaccu.client import (
    AccessDeniedError,
    AnswerTimeoutError,
    ChatClient,
    ChatError,
    ContextFullError,
    InvalidAnswerError,
    LimitReachedError,
    NoWorkerError,
    RequestRefusedError,
    Sampling,
    ServerFailedError,
    ServerUnreachableError,
    UnknownModelError,
    WorkerLostError,
    api_root,
)
from chaccu.conversation import Conversation, Message
from chaccu.errors import UsageError
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.scripted_judge import Reply, ScriptedJudge

HELLO = [Message("user", "Hello?")]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI({}) as fake:
        yield fake


async def collect(server: FakeOpenAI, model: str, **options: Any) -> tuple[str, ChatError | None]:
    """The text that came, and the error that ended it."""
    text = ""
    async with ChatClient(server.url, **options) as client:
        try:
            async for delta in client.stream_chat(model, HELLO):
                text += delta.text
        except ChatError as error:
            return text, error
    return text, None


async def test_stream_ends_with_finish_reason_and_usage(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel(answer="A vicuña is  small.\n\nYes.")}
    async with ChatClient(server.url) as client:
        deltas = [delta async for delta in client.stream_chat("tuned", HELLO)]
        whole = await client.complete_chat("tuned", HELLO)
        assert await client.models() == ["tuned"]
    assert "".join(delta.text for delta in deltas) == whole.text == "A vicuña is  small.\n\nYes."
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert deltas[-1].usage is not None
    assert whole.usage == deltas[-1].usage
    assert whole.usage.completion_tokens == len(deltas) - 1


async def test_request_carries_system_turns_and_sampling(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel()}
    turns = (Message("user", "One?"), Message("assistant", "Two."), Message("user", "Three?"), Message("assistant", None))
    sampling = Sampling(max_tokens=7, temperature=0.0, seed=3, stop=("\n",))
    async with ChatClient(server.url) as client:
        await client.complete_chat("tuned", Conversation(messages=turns, system="Be brief."), sampling)
    body = server.requests[-1]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    assert (body["max_tokens"], body["temperature"], body["seed"], body["stop"]) == (7, 0.0, 3, ["\n"])
    assert "top_p" not in body


async def test_messages_of_the_openai_form_go_through_as_they_are(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel()}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
    async with ChatClient(server.url) as client:
        await client.complete_chat("tuned", messages)
    assert server.requests[-1]["messages"] == messages


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        (FakeModel(failure="no_worker"), NoWorkerError, "No worker serves 'tuned' now"),
        (FakeModel(failure="limit"), LimitReachedError, "takes no more requests now"),
        (FakeModel(failure="failed"), ServerFailedError, "HTTP 500"),
        (FakeModel(failure="context"), ContextFullError, "9000 tokens; 'tuned' holds 4096"),
        (FakeModel(failure="denied"), AccessDeniedError, "The key is not known"),
        (FakeModel(failure="garbage"), InvalidAnswerError, "without a finish reason"),
    ],
)
async def test_failure_before_the_answer_names_its_cause(
    server: FakeOpenAI, model: FakeModel, kind: type[ChatError], words: str
) -> None:
    server.models = {"tuned": model}
    text, error = await collect(server, "tuned")
    assert text == ""
    assert type(error) is kind
    assert words in str(error)
    assert error.model == "tuned"


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        ("worker_lost", WorkerLostError, "worker of 'tuned' was lost"),
        ("failed", ServerFailedError, "in the middle of the answer: The engine of 'tuned' failed."),
        ("half", InvalidAnswerError, "not in the form of the OpenAI API"),
        ("cut", InvalidAnswerError, "broke off"),
    ],
)
async def test_failure_in_mid_answer_keeps_what_came(
    server: FakeOpenAI, failure: Any, kind: type[ChatError], words: str
) -> None:
    server.models = {"tuned": FakeModel(answer="one two three four", failure=failure, fail_after=2)}
    text, error = await collect(server, "tuned")
    assert text == "one two"
    assert type(error) is kind
    assert words in str(error)


async def test_silence_is_a_time_out_with_its_limit(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel(failure="silent", fail_after=1, answer="one two")}
    text, error = await collect(server, "tuned", timeout_s=0.3)
    assert text == "one"
    assert type(error) is AnswerTimeoutError
    assert "silent for 0.3 s" in str(error)


async def test_unknown_model_names_the_near_ones(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel(), "base": FakeModel()}
    _, error = await collect(server, "tund")
    assert type(error) is UnknownModelError
    assert "'tund'" in str(error)
    assert "did you mean 'tuned'?" in str(error)


async def test_nobody_listens_at_the_url() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with ChatClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(ServerUnreachableError, match=f"127.0.0.1:{port}/v1 cannot be reached"):
            await client.models()


async def test_closing_the_stream_ends_the_work_at_the_server(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel(answer="word " * 200, delay_s=0.02)}
    before = server.cancelled
    async with ChatClient(server.url) as client, contextlib.aclosing(client.stream_chat("tuned", HELLO)) as stream:
        await anext(stream)
    for _ in range(100):
        if server.cancelled > before:
            break
        await asyncio.sleep(0.02)
    assert server.cancelled > before, "the server went on writing for 2 s"


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("https://example.org/api/v1", "https://example.org/api/v1"),
    ],
)
def test_api_root(given: str, root: str) -> None:
    assert api_root(given) == root


@pytest.mark.parametrize("given", ["", "ftp://example.org", "http://", "http://host:notaport"])
def test_no_url(given: str) -> None:
    with pytest.raises(UsageError, match="is no URL of a server"):
        api_root(given)


async def test_the_last_delta_names_the_model_that_answered() -> None:
    with ScriptedJudge(lambda body, number: Reply(text="Hi.", model="gpt-0613")) as server:
        async with ChatClient(server.url) as client:
            whole = await client.complete_chat("gpt", HELLO, response_format={"type": "json_object"})
            assert (whole.text, whole.model) == ("Hi.", "gpt-0613")
            server.script = lambda body, number: Reply(text="Hi.")
            assert (await client.complete_chat("gpt", HELLO)).model is None
    assert [body.get("response_format") for body in server.bodies] == [{"type": "json_object"}, None]


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [("7", 7.0), ("1.5", 1.5), ("in a while", None), ("", None), ("-3", None)],
)
async def test_what_a_server_asks_to_wait_is_with_the_error(header: str, wait_s: float | None) -> None:
    error = await _refused(header)
    assert error.retry_after_s == wait_s


async def test_a_date_to_wait_for_becomes_seconds() -> None:
    error = await _refused(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert error.retry_after_s is not None
    assert 50 < error.retry_after_s <= 60
    assert (await _refused("Wed, 21 Oct 2015 07:28:00 GMT")).retry_after_s == 0.0


async def _refused(retry_after: str) -> ChatError:
    reply = Reply(status=429, headers={"retry-after": retry_after})
    with ScriptedJudge(lambda body, number: reply) as server:
        async with ChatClient(server.url) as client:
            with pytest.raises(LimitReachedError) as caught:
                await client.complete_chat("gpt", HELLO)
    return caught.value


async def test_a_model_that_takes_newer_parameters_alone_is_asked_with_those() -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        if "max_tokens" in body:
            said = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            return Reply(status=400, param="max_tokens", code="unsupported_parameter", text=said)
        if "temperature" in body:
            return Reply(status=400, param="temperature", code="unsupported_value", text="Only the default (1) value is taken.")
        return Reply(text="Hi.")

    with ScriptedJudge(script) as server:
        async with ChatClient(server.url) as client:
            for _ in range(2):
                assert (await client.complete_chat("new", HELLO, Sampling(max_tokens=9, temperature=0.0))).text == "Hi."
    # Two refusals, and none a second time.
    assert [body.get("max_completion_tokens") for body in server.bodies] == [None, 9, 9, 9]


async def test_other_refusals_are_told() -> None:
    reply = Reply(status=400, param="n", text="n is too large")
    with ScriptedJudge(lambda body, number: reply) as server:
        async with ChatClient(server.url) as client:
            with pytest.raises(RequestRefusedError, match="n is too large"):
                await client.complete_chat("new", HELLO, Sampling(max_tokens=9, temperature=0.0))
    assert len(server.bodies) == 1


async def test_a_refusal_in_its_own_field_is_the_text() -> None:
    with ScriptedJudge(lambda body, number: Reply(refusal="I cannot judge that.")) as server:
        async with ChatClient(server.url) as client:
            assert (await client.complete_chat("gpt", HELLO)).text == "I cannot judge that."


@pytest.mark.parametrize(
    ("reply", "was_taken"),
    [
        (Reply(status=500), False),
        (Reply(status=429), False),
        (Reply(how="reset"), True),
        (Reply(how="garbage"), True),
        (Reply(how="half"), True),
        (Reply(how="silent"), True),
    ],
)
async def test_an_error_says_whether_the_server_may_have_worked(reply: Reply, was_taken: bool) -> None:
    with ScriptedJudge(lambda body, number: reply) as server:
        async with ChatClient(server.url, timeout_s=0.2) as client:
            with pytest.raises(ChatError) as caught:
                await client.complete_chat("gpt", HELLO)
    assert caught.value.was_taken is was_taken


async def test_a_server_that_takes_no_connection_was_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaccu.client.chat_client._CONNECT_S", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        # What the queue of connections holds, others wait for.
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                one = stack.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))
            async with ChatClient(f"127.0.0.1:{port}", timeout_s=5) as client:
                with pytest.raises(ServerUnreachableError, match=r"no connection within 0\.2 s") as caught:
                    await client.complete_chat("gpt", HELLO)
    assert not caught.value.was_taken
