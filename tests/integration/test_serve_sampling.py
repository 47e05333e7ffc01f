"""Sampling parameters through a real gateway, with the official client: a tiny LLaMA in both engines for models, and the
scripted engine for what an engine cannot.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from chaccu.conversation import TextTokenizer
from chaccu.testing.processes import Service, start_gateway, start_worker
from chaccu.testing.tiny import build_llama
from chaccu.testing.tiny_gguf import write_llama_gguf

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

HELLO = [{"role": "user", "content": "What colour is the sky?"}]
MODELS = ["llamacpp", "transformers"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.4)
    write_llama_gguf(folder)
    return folder


@pytest.fixture(scope="module")
def gateway(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    logs = tmp_path_factory.mktemp("parameters")
    with start_gateway(logs) as service, start_worker(logs, service, "scripted:words"), ThreadPoolExecutor() as pool:
        # Loading takes seconds, and each loads by itself.
        options = [("--engine", name, "--name", name, "--threads", "1") for name in MODELS]
        with contextlib.ExitStack() as workers:
            for started in [pool.submit(start_worker, logs / option[1], service, str(folder), *option) for option in options]:
                workers.enter_context(started.result())
            yield service


@pytest.fixture
def client(gateway: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("model", [*MODELS, "words"])
def test_logprobs_whole_and_streamed(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "temperature": 0, "max_tokens": 8, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=2).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content or []
    assert 0 < len(content) <= 8
    assert all(math.exp(one.logprob) <= 1 and len(one.top_logprobs) == 2 for one in content)
    streamed = [
        one
        for chunk in client.chat.completions.create(**asked, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert [one.token for one in streamed] == [one.token for one in content]
    assert all(not one.top_logprobs for one in client.chat.completions.create(**asked).choices[0].logprobs.content)
    raw = client.completions.create(model=model, prompt="The sky", temperature=0, max_tokens=6, logprobs=1).choices[0]
    assert raw.logprobs is not None
    assert len(raw.logprobs.tokens) == len(raw.logprobs.text_offset) == len(raw.logprobs.top_logprobs) > 0
    assert raw.logprobs.text_offset[0] == 0
    assert all(place <= len(raw.text) for place in raw.logprobs.text_offset)


@pytest.mark.parametrize("model", MODELS)
def test_a_bias_and_penalties_change_the_answer(client: openai.OpenAI, folder: Path, model: str) -> None:
    token = TextTokenizer.load(folder).token_id("Ġllama")

    def ask(**more: Any) -> str:
        asked: dict[str, Any] = {"model": model, "messages": HELLO, "temperature": 0, "max_tokens": 6}
        return client.chat.completions.create(**asked, **more).choices[0].message.content or ""

    assert ask(logit_bias={str(token): 100}) == " llama" * 6
    assert " llama" not in ask(logit_bias={str(token): -100})
    # Each llama costs the next one 2, until another token is likelier.
    assert (
        1
        <= ask(logit_bias={str(token): 22}, frequency_penalty=2.0).count(" llama")
        < ask(logit_bias={str(token): 22}).count(" llama")
    )
    assert ask(extra_body={"repetition_penalty": 10}, logit_bias={str(token): 40}).count(" llama") == 1
    assert ask(presence_penalty=2.0) != "" != ask(n=2)


@pytest.mark.parametrize("model", MODELS)
def test_answers_keep_to_a_schema(client: openai.OpenAI, model: str) -> None:
    def ask(response_format: dict[str, Any], **more: Any) -> Any:
        return client.chat.completions.create(
            model=model, messages=HELLO, response_format=response_format, max_tokens=200, seed=5, **more
        )

    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": SCHEMA}}
    form = {"type": "json_schema", "name": "animal", "strict": True, "schema": SCHEMA}
    answer = client.responses.create(model=model, input="Hi", text={"format": form}, max_output_tokens=200, temperature=0)
    assert set(json.loads(answer.output_text)) == {"name", "legs"}
    assert answer.text.format.type == "json_schema"
    with pytest.raises(openai.BadRequestError, match="schema cannot be carried out") as caught:
        client.responses.create(model=model, input="Hi", text={"format": {**form, "schema": {"type": "nonsense"}}})
    assert (caught.value.param, caught.value.code) == ("text.format", "invalid_value")
    for temperature in (0, 1):
        found = json.loads(ask(wanted, temperature=temperature, n=1).choices[0].message.content)
        assert set(found) == {"name", "legs"}
        assert 0 <= found["legs"] <= 9
        assert len(found["name"]) <= 5
    for wrong, text in (
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ):
        with pytest.raises(openai.BadRequestError, match=f"schema cannot be carried out.*{text}") as caught:
            ask({"type": "json_schema", "json_schema": {"name": "x", "schema": wrong}})
        assert (caught.value.param, caught.value.code) == ("response_format", "invalid_value")


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "penalty": ({"presence_penalty": 1}, "presence_penalty", "not carried out by the engine scripted"),
    "bias": ({"logit_bias": {"5": 1}}, "logit_bias", "not carried out by the engine scripted"),
    "JSON": ({"response_format": {"type": "json_object"}}, "response_format", "not carried out by the engine scripted"),
    "unknown token": (
        {"model": "llamacpp", "logit_bias": {"99999": 1}},
        "logit_bias",
        "token 99999: the vocabulary of 'llamacpp' has",
    ),
    "large bias": ({"logit_bias": {"5": 300}}, "logit_bias", "300; it must be a number from -100 to 100"),
    "many likely": ({"logprobs": True, "top_logprobs": 50}, "top_logprobs", "top_logprobs = 50: expected int <= 20"),
    "two penalties": (
        {"model": "llamacpp", "frequency_penalty": 1, "extra_body": {"repetition_penalty": 1.5}},
        "frequency_penalty",
        "frequency_penalty and repetition_penalty together",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_or_not_possible_is_said_with_its_value(client: openai.OpenAI, case: str) -> None:
    fields, param, text = WRONG[case]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "words", "messages": HELLO, **fields})
    assert caught.value.param == param
    assert text in caught.value.message


@pytest.mark.parametrize("model", [*MODELS, "words"])
def test_embeddings_in_every_form(client: openai.OpenAI, model: str) -> None:
    found = client.embeddings.create(model=model, input=["The sky", "a herd", "The sky"], encoding_format="float")
    assert [entry.index for entry in found.data] == [0, 1, 2]
    vectors = [entry.embedding for entry in found.data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert math.hypot(*vectors[0]) == pytest.approx(1, abs=1e-3)
    # The client asks for base64 by itself, and decodes it.
    assert client.embeddings.create(model=model, input="The sky").data[0].embedding == pytest.approx(vectors[0], abs=1e-6)
    assert found.usage.prompt_tokens == found.usage.total_tokens > 3
    by_ids = client.embeddings.create(model=model, input=[[65, 66], [67]])
    assert (len(by_ids.data), by_ids.usage.prompt_tokens) == (2, 3)
    with pytest.raises(openai.BadRequestError, match="no token 99,999") as unknown:
        client.embeddings.create(model=model, input=[99_999])
    assert unknown.value.param == "input"
    with pytest.raises(openai.BadRequestError, match="an input to embed has 90,000 tokens") as long:
        client.embeddings.create(model=model, input=[65] * 90_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")


def test_both_engines_give_the_same_vectors(client: openai.OpenAI) -> None:
    one, other = [client.embeddings.create(model=model, input="The sky is blue.").data[0].embedding for model in MODELS]
    assert one == pytest.approx(other, abs=1e-3)


async def test_tokens_of_prompts_and_back(gateway: Service, folder: Path) -> None:
    async with aiohttp.ClientSession(gateway.url) as http:

        async def ask(path: str, **fields: Any) -> dict[str, Any]:
            async with http.post(path, json={"model": "llamacpp", **fields}) as response:
                return {"status": response.status, **await response.json()}

        tokenizer = TextTokenizer.load(folder)
        raw = await ask("/tokenize", prompt="The sky<|im_end|>")
        assert raw["tokens"] == [*tokenizer.encode_texts(["The sky"], first=[True])[0], tokenizer.token_id("<|im_end|>")]
        assert (raw["count"], raw["max_model_len"]) == (len(raw["tokens"]), 512)
        assert (await ask("/detokenize", tokens=raw["tokens"]))["prompt"] == "The sky<|im_end|>"
        chat = await ask("/tokenize", messages=HELLO)
        closed = await ask("/tokenize", messages=HELLO, add_generation_prompt=False)
        assert chat["tokens"][: closed["count"]] == closed["tokens"]
        assert (await ask("/detokenize", tokens=chat["tokens"]))["prompt"].endswith("<|im_start|>assistant\n")
        begun = await ask("/tokenize", messages=[*HELLO, {"role": "assistant", "content": "Blue"}])
        assert begun["tokens"][: chat["count"]] == chat["tokens"]
        assert begun["count"] > chat["count"]
        # It counts what an answer's usage counts.
        client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, http_client=None)
        usage = (await client.chat.completions.create(model="llamacpp", messages=HELLO, max_tokens=1)).usage
        assert usage is not None
        assert usage.prompt_tokens == chat["count"]
        wrong = await ask("/detokenize", tokens=[99_999])
        assert (wrong["status"], wrong["error"]["param"]) == (400, "tokens")
        unknown = await ask("/tokenize", model="nobody", prompt="x")
        assert (unknown["status"], unknown["error"]["code"]) == (404, "model_not_found")
