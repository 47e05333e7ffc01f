"""What the transformers engine does with ids: characters split over tokens, replies begun elsewhere, failures of the model."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chaccu.engine import EngineLostError, EngineOptions, GenerationRequest, WrongRequestError, resolve_model
from chaccu.engine.scripted import build_byte_backend, build_byte_tokenizer
from chaccu.engine.transformers import TransformersEngine
from chaccu.errors import EngineError
from chaccu.testing.tiny import build_llama

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
ANSWER = "Añil, 山 and 🦙 meet."
PROMPT = "what?"
BYTES = build_byte_tokenizer()


class StandIn:
    """Called as models are, through `forward`."""

    def __call__(self, **inputs: Any) -> Any:
        return self.forward(**inputs)


class Reciter(StandIn):
    """Stands for a model: after the prompt it always gives the next byte of ANSWER, fed in one go or in steps."""

    def __init__(self) -> None:
        # With states that cannot be joined: each answer is stepped by itself.
        self.config = transformers.Lfm2Config(num_hidden_layers=1, layer_types=["conv"], max_position_embeddings=128)
        self.generation_config = SimpleNamespace(eos_token_id=BYTES.token_id("<|im_end|>"))
        self.device = torch.device("cpu")
        self.fails = False

    def forward(self, *, input_ids: Any, past_key_values: int | None, **_: Any) -> Any:
        if self.fails:
            raise RuntimeError("out of memory")
        seen = (past_key_values or 0) + input_ids.shape[1]
        answer = [*ids_of(ANSWER), self.generation_config.eos_token_id]
        logits = torch.zeros(1, 1, BYTES.vocab_size)
        logits[0, 0, answer[seen - len(PROMPT)]] = 50.0
        return SimpleNamespace(logits=logits, past_key_values=seen)


def ids_of(text: str) -> list[int]:
    return BYTES.encode_texts([text], first=[False])[0]


async def pieces(engine: TransformersEngine, **fields: Any) -> list[str]:
    request = GenerationRequest(id="r", prompt_ids=ids_of(PROMPT), **fields)
    return [delta.text async for delta in engine.generate(request)]


async def test_characters_split_over_tokens_come_whole() -> None:
    engine = TransformersEngine(Reciter(), build_byte_backend(), EngineOptions())
    texts = await pieces(engine)
    assert "".join(texts) == ANSWER
    assert "🦙" in texts
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)
    # Cut inside the second character, two bytes long: its first byte alone is not sent.
    assert "".join(await pieces(engine, max_tokens=2)) == "A"
    await engine.close()


@pytest.mark.parametrize("cut", [0, 1, 2, 7, len(ANSWER)])
async def test_a_reply_begun_elsewhere_is_gone_on_with(cut: int) -> None:
    engine = TransformersEngine(Reciter(), build_byte_backend(), EngineOptions())
    assert "".join(await pieces(engine, reply_ids=ids_of(ANSWER[:cut]))) == ANSWER[cut:]
    await engine.close()


async def test_a_failing_model_fails_its_request_and_not_the_engine() -> None:
    model = Reciter()
    engine = TransformersEngine(model, build_byte_backend(), EngineOptions())
    model.fails = True
    with pytest.raises(EngineError, match="out of memory"):
        await pieces(engine)
    model.fails = False
    assert "".join(await pieces(engine)) == ANSWER
    await engine.close()


async def test_a_thread_that_fails_is_a_lost_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from chaccu.engine.batching.batcher import Batcher

    engine = TransformersEngine(Reciter(), build_byte_backend(), EngineOptions())
    engine.check()
    monkeypatch.setattr(Batcher, "run_round", lambda _: 1 // 0)
    for _ in range(2):  # the one that meets it, and who comes after
        with pytest.raises(EngineLostError, match="the model's thread has failed: ZeroDivisionError"):
            await asyncio.wait_for(pieces(engine), 5)
    with pytest.raises(EngineLostError):
        engine.check()
    await engine.close()


async def test_a_closed_engine_refuses() -> None:
    engine = TransformersEngine(Reciter(), build_byte_backend(), EngineOptions())
    await engine.close()
    with pytest.raises(EngineError, match="closing"):
        await pieces(engine)


class Favours(StandIn):
    """Stands for a model: logits that depend on the last id alone, known to the test. It writes ASCII."""

    def __init__(self) -> None:
        reciter = Reciter()
        self.config, self.generation_config, self.device = reciter.config, reciter.generation_config, reciter.device
        generator = torch.Generator().manual_seed(3)
        self.logits_VV = torch.full((BYTES.vocab_size, BYTES.vocab_size), -30.0)
        ascii_ids = ids_of("".join(map(chr, range(128))))
        self.logits_VV[:, ascii_ids] = torch.randn(BYTES.vocab_size, 128, generator=generator) * 2

    def forward(self, *, input_ids: Any, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits_VV[input_ids[:, -1:]], past_key_values=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.8},
        {"presence_penalty": -1.0, "frequency_penalty": 0.9, "repetition_penalty": 1.2, "logit_bias": {65: 4.0, 66: -3.0}},
    ],
)
@pytest.mark.parametrize("reply", [[], [65, 66, 65]])
async def test_penalties_biases_and_logprobs_are_those_computed_by_hand(settings: dict[str, Any], reply: list[int]) -> None:
    model = Favours()
    engine = TransformersEngine(model, build_byte_backend(), EngineOptions())
    request = GenerationRequest(
        id="r", prompt_ids=ids_of(PROMPT), reply_ids=reply, temperature=0.0, max_tokens=30, top_logprobs=4, **settings
    )
    told = [one for delta in [delta async for delta in engine.generate(request)] for one in delta.logprobs]
    await engine.close()
    prompt, answer = ids_of(PROMPT), list(reply)
    for one in told:
        logits = model.logits_VV[(prompt + answer)[-1]].tolist()
        total = math.log(sum(math.exp(value) for value in logits))
        scores = list(logits)
        for token, bias in settings.get("logit_bias", {}).items():
            scores[token] += bias
        for token in set(prompt + answer):
            penalty = settings.get("repetition_penalty", 1.0)
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        for token in set(answer):
            scores[token] -= settings.get("frequency_penalty", 0.0) * answer.count(token) + settings.get(
                "presence_penalty", 0.0
            )
        chosen = max(range(len(scores)), key=scores.__getitem__)
        best = sorted(logits, reverse=True)[:4]
        assert one.token == BYTES.decode([chosen]).encode()
        assert one.logprob == pytest.approx(logits[chosen] - total, abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx([value - total for value in best], abs=1e-4)
        answer.append(chosen)
    assert len(told) > 5


async def test_an_answer_that_was_begun_keeps_to_its_schema_to_the_end() -> None:
    schema = '{"type": "object", "properties": {"a": {"enum": [17, 18]}}, "required": ["a"], "additionalProperties": false}'
    engine = TransformersEngine(Favours(), build_byte_backend(), EngineOptions())
    for temperature in (0.0, 1.0):
        rest = "".join(await pieces(engine, json_schema=schema, reply_ids=ids_of('{"a": 1'), temperature=temperature, seed=1))
        assert rest in ("7}", "8}")
    with pytest.raises(WrongRequestError, match="does not keep to the JSON schema"):
        await pieces(engine, json_schema=schema, reply_ids=ids_of("Well, "))
    await engine.close()


async def test_a_seed_repeats_with_penalties() -> None:
    engine = TransformersEngine(Favours(), build_byte_backend(), EngineOptions())
    settings = {"seed": 4, "frequency_penalty": 1.0, "max_tokens": 20}
    first, again = ["".join(await pieces(engine, **settings)) for _ in range(2)]
    assert first == again
    await engine.close()


async def test_vectors_are_the_mean_of_the_last_hidden_states(tmp_path: Path) -> None:
    folder = build_llama(tmp_path / "tiny")
    engine = TransformersEngine.load(resolve_model(str(folder)), EngineOptions(threads=1))
    vectors = await engine.embed([[5, 6, 7, 8], [9]])
    await engine.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        for ids, vector in zip([[5, 6, 7, 8], [9]], vectors, strict=True):
            mean = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
            assert vector == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
