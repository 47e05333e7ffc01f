"""What clients may ask for of an answer, and how it is written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chaccu.serve.gateway.dialects.openai_dialects import CHAT, COMPLETIONS
from chaccu.serve.gateway.dialects.responses import CompletionWriter
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.workers.abilities import check_abilities
from chaccu.serve.gateway.workers.answer import AnswerPart, AnswerUsage, Job
from chaccu.serve.gateway.workers.choices import WholeAnswer
from chaccu.serve.link import ModelOffer, Sampling, TokenLogprob

ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
SAID = ASKED["messages"]
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(**fields: Any) -> Sampling:
    return CHAT.read({**ASKED, **fields}).job.sampling


def test_what_is_left_out_asks_for_nothing() -> None:
    sampling = chat(presence_penalty=None, frequency_penalty=0, logit_bias={}, logprobs=False, response_format={"type": "text"})
    assert sampling == chat() == Sampling()
    assert Job(model="m", sampling=sampling).request().needs() == {}


def test_parameters_reach_the_sampling_and_name_their_abilities() -> None:
    sampling = chat(
        presence_penalty=-1.5,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias={"42": -100, "7": 3.5},
        logprobs=True,
        top_logprobs=3,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}},
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-1.5, 0.5, 1.2)
    assert sampling.logit_bias == {42: -100.0, 7: 3.5}
    assert sampling.top_logprobs == 3
    assert json.loads(sampling.json_schema or "") == SCHEMA
    needs = Job(model="m", sampling=sampling).request().needs()
    assert set(needs) == {"penalties", "logit_bias", "logprobs", "json_schema"}
    assert needs["json_schema"] == "response_format"
    assert "json_resumed" in Job(model="m", sampling=sampling).request("{").needs()


def test_logprobs_in_both_forms() -> None:
    assert [chat(logprobs=True).top_logprobs, chat(top_logprobs=2).top_logprobs, chat(logprobs=False).top_logprobs] == [
        0,
        2,
        None,
    ]
    raw = COMPLETIONS.read({"model": "m", "prompt": "x", "logprobs": 4}).job.sampling
    assert raw.top_logprobs == 4
    assert json.loads(chat(response_format={"type": "json_object"}).json_schema or "") == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"n": 10**9}, "n", "<= 128"),
        ({"presence_penalty": 3}, "presence_penalty", "presence_penalty = 3: expected float <= 2"),
        ({"frequency_penalty": "much"}, "frequency_penalty", "'much'"),
        ({"repetition_penalty": 0}, "repetition_penalty", "> 0"),
        ({"top_logprobs": 50}, "top_logprobs", "top_logprobs = 50: expected int <= 20"),
        ({"logprobs": 5}, "logprobs", "logprobs = 5"),
        ({"logit_bias": {"7": 300}}, "logit_bias", "logit_bias of token 7 = 300; it must be a number from -100 to 100"),
        ({"logit_bias": {"7": True}}, "logit_bias", "True"),
        ({"logit_bias": {"seven": 1}}, "logit_bias", "'seven': write tokens as their ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
        ({"logit_bias": [7]}, "logit_bias", "[7]"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
            "object",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "the tools are: f"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (
            {"tools": [TOOL], "messages": [{"role": "assistant", "content": "I"}]},
            "messages",
            "let a user's or a tool's be the last",
        ),
        ({"tools": [TOOL], "messages": [{"role": "tool", "content": "I"}]}, "messages", "no tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 3}]}, *SAID]}, "messages", "tool_calls of message 0"),
        ({"messages": [{"role": "assistant", "content": None}, *SAID]}, "messages", "content of message 0 is not text"),
    ],
)
def test_wrong_values_are_named_with_their_limits(fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert text in caught.value.message


def offer(engine: str, *abilities: str) -> ModelOffer:
    return ModelOffer(
        name="m", engine=engine, context_tokens=9, slots=1, chat_format="chatml", abilities=abilities, vocab_size=100
    )


def test_what_no_worker_can_is_refused_before_one_is_asked() -> None:
    request = Job(model="m", sampling=Sampling(logit_bias={99: 1.0}, presence_penalty=1.0)).request()
    check_abilities(request, [])
    check_abilities(request, [offer("weak"), offer("strong", "penalties", "logit_bias")])
    with pytest.raises(ApiError, match="presence_penalty is not carried out by the engine strong and weak of 'm'") as caught:
        check_abilities(request, [offer("weak"), offer("strong", "logit_bias")])
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "unsupported_parameter", "presence_penalty")
    unknown = Job(model="m", sampling=Sampling(logit_bias={100: 1.0})).request()
    with pytest.raises(ApiError, match=r"token 100: the vocabulary of 'm' has 100 tokens"):
        check_abilities(unknown, [offer("strong", "logit_bias")])


# "né!" in three tokens, the second of which is the first half of its "é".
LOGPROBS = [
    TokenLogprob(b"n", -0.5, [(b"n", -0.5), (b"m", -1.5)]),
    TokenLogprob(b"\xc3", -0.1, [(b"\xc3", -0.1)]),
    TokenLogprob(b"\xa9!", -0.2, []),
]


def writer(chat: bool) -> CompletionWriter:
    return CompletionWriter(answer_id="x", created_s=1, model="m", chat=chat, with_usage=False)


def choice_of(event: bytes) -> dict[str, Any]:
    (choice,) = json.loads(event.removeprefix(b"data: "))["choices"]
    return dict(choice)


def test_logprobs_of_a_chat() -> None:
    event = choice_of(writer(True).texts(AnswerPart(["n", "é!"], logprobs=LOGPROBS)))
    assert event["delta"] == {"content": "né!"}
    content = event["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["n", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}!"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "né!"
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["n", "m"]
    last = AnswerPart([], "stop", AnswerUsage(1, 3))
    whole = json.loads(writer(True).whole([WholeAnswer(["né!"], LOGPROBS, last)], AnswerUsage(1, 3)))
    assert whole["choices"][0]["logprobs"] == event["logprobs"]
    assert choice_of(writer(True).texts(AnswerPart(["a"])))["logprobs"] is None


def test_logprobs_of_a_raw_completion_keep_their_place() -> None:
    written = writer(False)
    first = choice_of(written.texts(AnswerPart(["n"], logprobs=LOGPROBS[:1])))
    second = choice_of(written.texts(AnswerPart(["é!"], logprobs=LOGPROBS[1:])))
    assert first["text"] + second["text"] == "né!"
    assert first["logprobs"]["top_logprobs"] == [{"n": -0.5, "m": -1.5}]
    assert first["logprobs"]["token_logprobs"] + second["logprobs"]["token_logprobs"] == [-0.5, -0.1, -0.2]
    assert first["logprobs"]["text_offset"] + second["logprobs"]["text_offset"] == [0, 1, 1]
