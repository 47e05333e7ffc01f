"""llama.cpp and transformers on one model in float32: the same answers, log-probabilities, penalties and vectors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from chaccu.conversation import TextTokenizer
from chaccu.engine import Engine, EngineOptions, GenerationRequest, TokenLogprob, WrongRequestError, resolve_model
from chaccu.engine.openai import KEY_VARIABLE
from chaccu.engine.registry import load_engine

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

from chaccu.testing.tiny import build_llama
from chaccu.testing.tiny_gguf import write_llama_gguf

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [60, 61, 90, 110, 75, 300, 301]
REPLY = [60, 120, 120]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(folder: Path) -> AsyncIterator[list[Engine]]:
    source, options = resolve_model(str(folder)), EngineOptions(threads=1, slots=2, context_tokens=256)
    loaded = [await asyncio.to_thread(load_engine(name).load, source, options) for name in ("llamacpp", "transformers")]
    yield loaded
    for engine in loaded:
        await engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide weights, as random ones of the usual range hardly prefer any token.
    folder = build_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.4)
    write_llama_gguf(folder)
    return folder


@pytest.fixture(scope="module")
def forbidden(folder: Path) -> dict[int, float]:
    """Biases that leave only tokens of printable ASCII: of others' bytes the engines tell in different pieces."""
    tokenizer = TextTokenizer.load(folder)
    texts = {token: tokenizer.decode([token]) for token in range(tokenizer.vocab_size)}
    plain = {token for token, text in texts.items() if text.isascii() and text.isprintable()} - tokenizer.special_ids
    return dict.fromkeys(set(texts) - plain, -100.0)


async def logprobs_of(engine: Engine, **settings: Any) -> list[TokenLogprob]:
    base = {"id": "r", "prompt_ids": PROMPT, "temperature": 0.0, "max_tokens": 16, "top_logprobs": 3}
    request = GenerationRequest(**{**base, **settings})
    return [one for delta in [delta async for delta in engine.generate(request)] for one in delta.logprobs]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logit_bias": {100: 3.0, 101: -2.0}},
        {"frequency_penalty": 1.5},
        {"frequency_penalty": 2.0, "logit_bias": {60: 14.0}},
        {"presence_penalty": 2.0, "logit_bias": {100: 14.0, 101: 14.0}},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 1.3, "logit_bias": {75: 12.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("reply", [[], REPLY], ids=["fresh", "begun"])
async def test_answers_and_logprobs_are_the_same(
    engines: list[Engine], forbidden: dict[int, float], settings: dict[str, Any], reply: list[int]
) -> None:
    settings = {**settings, "reply_ids": reply, "logit_bias": {**forbidden, **settings.get("logit_bias", {})}}
    llamacpp, transformers = [await logprobs_of(engine, **settings) for engine in engines]
    assert len(transformers) == 16
    assert [one.token for one in llamacpp] == [one.token for one in transformers]
    for one, other in zip(llamacpp, transformers, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.1)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=0.1)


async def test_vectors_are_the_same(engines: list[Engine]) -> None:
    llamacpp, transformers = [(await engine.embed([PROMPT]))[0] for engine in engines]
    assert llamacpp == pytest.approx(transformers, abs=1e-3)


async def test_llamacpp_says_what_it_does_not_combine_or_go_on_with(engines: list[Engine]) -> None:
    llamacpp = engines[0]
    with pytest.raises(WrongRequestError, match="frequency_penalty and repetition_penalty together"):
        await logprobs_of(llamacpp, frequency_penalty=1.0, repetition_penalty=1.1)
    with pytest.raises(WrongRequestError, match="cannot go on with an answer that keeps to a JSON schema"):
        await logprobs_of(llamacpp, json_schema="{}", reply_ids=REPLY)
    assert "json_resumed" not in llamacpp.info.abilities


async def test_llamacpp_answers_the_same_as_a_server_of_the_engine_openai(
    engines: list[Engine], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llamacpp: Any = engines[0]
    monkeypatch.setenv(KEY_VARIABLE, llamacpp._server.key)
    source = resolve_model(str(folder), name=str(folder / "model.gguf"), url=f"{llamacpp._server.url}/v1")
    openai = await asyncio.to_thread(load_engine("openai").load, source, EngineOptions())
    assert openai.info.context_tokens == 256
    assert openai._server.takes_ids  # type: ignore[attr-defined]
    request = GenerationRequest(id="r", prompt_ids=PROMPT, reply_ids=REPLY, temperature=0.0, max_tokens=20)
    answers = [[delta async for delta in engine.generate(request)] for engine in (llamacpp, openai)]
    await openai.close()
    texts = ["".join(delta.text for delta in deltas) for deltas in answers]
    assert texts[0] == texts[1] != ""
    assert answers[0][-1].usage == answers[1][-1].usage
