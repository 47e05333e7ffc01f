"""The OpenAI API of a real gateway with a real worker, through the official client and by hand."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from chaccu.serve.link import PROTOCOL_VERSION, Join, ModelOffer, Refused, decode_to_worker, encode_frame
from chaccu.testing.processes import Service, start_gateway, start_worker

HELLO = [{"role": "user", "content": "Hi"}]
ANSWER = "One answer, naïve 🦙 and\nin two lines."


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("api")
    with (
        start_gateway(folder, "--upstream", "gone=http://127.0.0.1:9/v1", "--rejoin-wait", "0.5") as service,
        start_worker(folder, service, f"scripted:fixed?text={ANSWER}&context_tokens=200"),
        start_worker(folder, service, "scripted:words?tokens_per_s=100"),
        start_worker(folder, service, "scripted:mirror?echo=1"),
    ):
        yield service


@pytest.fixture
def client(gateway: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fixed", "gone", "mirror", "words"]


def test_a_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fixed", messages=HELLO)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ANSWER.split())
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_answer(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="fixed", messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    *body, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in body][-1] == "stop"
    assert body[0].choices[0].delta.role == "assistant"
    assert (usage.choices, usage.usage.completion_tokens) == ([], len(ANSWER.split()))
    plain = list(client.chat.completions.create(model="fixed", messages=HELLO, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_a_stream_grows_while_it_is_written(client: openai.OpenAI) -> None:
    moments = [time.monotonic() for _ in client.chat.completions.create(model="words", messages=HELLO, stream=True)]
    assert moments[-1] - moments[0] > 0.25


def test_limits_stop_strings_and_seeds(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="words", messages=HELLO, **more)

    short = ask(max_tokens=5)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 5)
    assert ask(max_completion_tokens=4).usage.completion_tokens == 4
    words = ask().choices[0].message.content.split(" ")
    stopped = ask(stop=[words[7]])
    assert stopped.choices[0].message.content == " ".join(words[: words.index(words[7])]) + (
        " " if words.index(words[7]) else ""
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert (
        ask(seed=1).choices[0].message.content
        == ask(seed=1).choices[0].message.content
        != ask(seed=2).choices[0].message.content
    )


def test_several_choices_whole_and_streamed(client: openai.OpenAI) -> None:
    def ask(n: int, **more: Any) -> Any:
        return client.chat.completions.create(model="words", messages=HELLO, n=n, seed=3, max_tokens=5, **more)

    whole = ask(3)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == ask(1).choices[0].message.content
    assert (whole.usage.completion_tokens, whole.usage.prompt_tokens) == (15, ask(1).usage.prompt_tokens)
    *body, usage = list(ask(3, stream=True, stream_options={"include_usage": True}))
    streamed = ["", "", ""]
    for chunk in body:
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert sorted(chunk.choices[0].index for chunk in body if chunk.choices[0].finish_reason == "length") == [0, 1, 2]
    assert (usage.choices, usage.usage.completion_tokens) == ([], 15)
    raw = client.completions.create(model="words", prompt="Once", n=2, seed=3)
    assert len({choice.text for choice in raw.choices}) == 2


def test_parameters_that_ask_for_nothing_are_accepted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fixed",
        messages=HELLO,
        n=1,
        presence_penalty=0.0,
        frequency_penalty=0,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        user="someone",
        metadata={"a": "b"},
    )
    assert answer.choices[0].message.content == ANSWER


def test_an_answer_that_the_client_has_begun_is_gone_on_with(client: openai.OpenAI) -> None:
    begun = [*HELLO, {"role": "assistant", "content": ANSWER[:20]}]
    assert client.chat.completions.create(model="fixed", messages=begun).choices[0].message.content == ANSWER[20:]


def test_system_and_parts_reach_the_prompt_and_control_text_stays_text(client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "part one "}, {"type": "text", "text": "<|im_end|> two"}]},
    ]
    seen = client.chat.completions.create(model="mirror", messages=messages).choices[0].message.content
    # The echo leaves special tokens out: what is left of "<|im_end|>" was never one.
    assert seen == "system\nBe brief.\nuser\npart one "
    raw = client.completions.create(model="mirror", prompt="a<|im_start|>b").choices[0].text
    assert raw == "ab"


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="fixed", prompt="Once")
    assert (whole.choices[0].text, whole.usage.prompt_tokens) == (ANSWER, 4)
    assert (
        "".join(chunk.choices[0].text for chunk in client.completions.create(model="fixed", prompt="Once", stream=True))
        == ANSWER
    )
    assert client.completions.create(model="words", prompt="Once").usage.completion_tokens == 16


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_are_answered_in_their_order(client: openai.OpenAI, as_ids: bool) -> None:
    texts = ["Once upon", "a time", "a time"]
    # Of this model a token is a byte, and no BOS is put before what comes as ids.
    prompts: Any = [list(text.encode()) for text in texts] if as_ids else texts
    options: dict[str, Any] = {"model": "words", "n": 2, "seed": 3, "max_tokens": 5}
    whole = client.completions.create(prompt=prompts, **options)
    alone = [client.completions.create(prompt=prompt, **options) for prompt in prompts]
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert [choice.text for choice in whole.choices] == [choice.text for one in alone for choice in one.choices]
    assert len({choice.text for choice in whole.choices}) == 4
    assert whole.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone) == sum(map(len, texts))
    assert whole.usage.completion_tokens == 30
    streamed = dict.fromkeys(range(6), "")
    for chunk in client.completions.create(prompt=prompts, stream=True, stream_options={"include_usage": True}, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == [choice.text for choice in whole.choices]
    assert chunk.usage == whole.usage


@pytest.mark.parametrize(
    ("given", "param", "text"),
    [
        ({"prompt": []}, "prompt", "there are 0 prompts; send 1 to 128"),
        ({"prompt": ["a", ""]}, "prompt", "prompt 1 = ''"),
        ({"prompt": [["a"]]}, "prompt", "prompt 0 = ['a']"),
        ({"prompt": [1, -2]}, "prompt", "neither a text nor a list of token ids"),
        ({"prompt": [300]}, "prompt", "there is no token 300"),
        ({"prompt": ["a"] * 2, "n": 65}, "n", "128 choices at most"),
        ({"prompt": "x" * 500}, "prompt", "context holds 200"),
    ],
)
def test_wrong_prompts_are_named(client: openai.OpenAI, given: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": "fixed", **given})
    assert refused.value.param == param
    assert text in refused.value.message


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLED = [*HELLO, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c", "content": "x"}]
WRONG: dict[str, tuple[str | dict[str, Any], int, str | None, str]] = {
    "no JSON": ('{"model": ', 400, None, "no valid JSON"),
    "a list": ("[1]", 400, None, "JSON array"),
    "nothing": ("", 400, None, "no valid JSON"),
    "no model": ({"messages": HELLO}, 400, "model", "missing"),
    "unknown model": ({"model": "fixd", "messages": HELLO}, 404, "model", "did you mean 'fixed'?"),
    "far model": ({"model": "gpt-4", "messages": HELLO}, 404, "model", "known: fixed, gone, mirror, words."),
    "no messages": ({"model": "fixed"}, 400, "messages", "missing"),
    "empty messages": ({"model": "fixed", "messages": []}, 400, "messages", "length"),
    "alien role": ({"model": "fixed", "messages": [{"role": "alien", "content": "Hi"}]}, 400, "messages", "alien"),
    "image": (
        {"model": "fixed", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages",
        "not text",
    ),
    "negative max_tokens": ({"max_tokens": -1}, 400, "max_tokens", "max_tokens = -1"),
    "max_tokens is text": ({"max_tokens": "many"}, 400, "max_tokens", "'many'"),
    "max_tokens beyond the context": ({"max_tokens": 100_000}, 400, "messages", "100,000 tokens; the context holds 200"),
    "long prompt": ({"messages": [{"role": "user", "content": "x" * 500}]}, 400, "messages", "context holds 200"),
    "hot": ({"temperature": 9}, 400, "temperature", "temperature = 9"),
    "top_p": ({"top_p": 5}, 400, "top_p", "<= 1"),
    "n": ({"n": 10**9}, 400, "n", "n = 1000000000: expected int <= 128"),
    "no choice": ({"n": 0}, 400, "n", "n = 0: expected int >= 1"),
    "stop is a number": ({"stop": 3}, 400, "stop", "stop = 3"),
    "stream maybe": ({"stream": "maybe"}, 400, "stream", "'maybe'"),
    "unknown parameter": ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools[0].function", "missing"),
    "a tool": ({"tools": [TOOL]}, 400, "tools", "tools is not carried out by the engine scripted of 'fixed'"),
    "a call": ({"messages": CALLED}, 400, "tools", "tools is not carried out by the engine scripted of 'fixed'"),
    "lone surrogate": ('{"model": "fixed", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, "no valid JSON"),
    "5 MB": ({"messages": [{"role": "user", "content": "x" * 5_000_000}]}, 413, None, "4,194,304"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("streamed", [False, True])
async def test_wrong_requests_get_openai_errors(http: aiohttp.ClientSession, case: str, streamed: bool) -> None:
    given, status, param, text = WRONG[case]
    if isinstance(given, dict):
        whole = given if "model" in given or case == "no model" else {"model": "fixed", "messages": HELLO, **given}
        given = json.dumps({"stream": streamed, **whole})
    async with http.post("/v1/chat/completions", data=given) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (status, param)
    assert text in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "`" not in error["message"]


async def test_wrong_paths_and_methods(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/nothing") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "unknown_url")
    async with http.get("/v1/chat/completions") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (405, "unknown_url")


async def test_health_readiness_and_metrics(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/chat/completions", json={"model": "fixed", "messages": HELLO}) as response:
        assert response.status == 200
    for path in ("/health", "/ready"):
        async with http.get(path) as response:
            assert response.status == 200
    async with http.get("/metrics") as response:
        text = await response.text()
    assert 'chaccu_requests_total{model="fixed",status="200"}' in text
    assert 'chaccu_workers{model="words"} 1.0' in text
    assert "fixd" not in text


async def test_a_page_in_a_browser_cannot_join(http: aiohttp.ClientSession) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await http.ws_connect("/workers/join", origin="http://evil.example")
    assert refused.value.status == 403


async def test_a_stranger_that_talks_nonsense_is_let_go(http: aiohttp.ClientSession) -> None:
    for nonsense in (b"\x93nonsense", b""):
        async with http.ws_connect("/workers/join") as stranger:
            await stranger.send_bytes(nonsense)
            assert (await stranger.receive(timeout=5)).type is aiohttp.WSMsgType.CLOSE
    async with http.ws_connect("/workers/join") as stranger:
        await stranger.send_str("hello")
        assert (await stranger.receive(timeout=5)).type is aiohttp.WSMsgType.CLOSE
    async with http.get("/ready") as response:
        assert response.status == 200


@pytest.mark.parametrize(("weight", "priority"), [(0.0, 0), (float("nan"), 0), (1e9, 0), (1.0, 10**6)])
async def test_a_worker_cannot_claim_all_requests(http: aiohttp.ClientSession, weight: float, priority: int) -> None:
    offer = ModelOffer(name="m", engine="e", context_tokens=9, slots=1, chat_format="chatml", weight=weight, priority=priority)
    async with http.ws_connect("/workers/join") as greedy:
        await greedy.send_bytes(encode_frame(Join(protocol=PROTOCOL_VERSION, worker="greedy", models=(offer,))))
        refused = decode_to_worker((await greedy.receive(timeout=5)).data)
    assert isinstance(refused, Refused)
    assert f"the weight {weight:g} and the priority {priority}" in refused.reason


async def test_an_upstream_is_relayed_and_a_dead_one_is_said(
    gateway: Service, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async with http.post("/v1/chat/completions", json={"model": "gone", "messages": HELLO}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (502, "upstream_unreachable")
    with await asyncio.to_thread(start_gateway, tmp_path, "--upstream", f"fixed={gateway.url}/v1") as front:
        client = openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0)
        chunks = [chunk async for chunk in await client.chat.completions.create(model="fixed", messages=HELLO, stream=True)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        with pytest.raises(openai.BadRequestError, match="temperature = 9"):
            await client.chat.completions.create(model="fixed", messages=HELLO, temperature=9)
        assert (await client.embeddings.create(model="fixed", input=["a", "b"])).usage.prompt_tokens == 2
        with pytest.raises(openai.BadRequestError, match="input"):
            await client.embeddings.create(model="fixed", input=5)  # type: ignore[arg-type]
        async with aiohttp.ClientSession(front.url) as before:
            for path, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
                async with before.post(path, json={"model": "fixed", **fields}) as response:
                    error = (await response.json())["error"]
                assert (response.status, error["code"]) == (400, "unsupported_endpoint")
