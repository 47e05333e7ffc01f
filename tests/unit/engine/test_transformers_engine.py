"""What the transformers engine does with ids: characters split over tokens, replies begun elsewhere, failures of the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chaccu.engine import EngineOptions, GenerationRequest
from chaccu.engine.scripted import build_byte_backend, build_byte_tokenizer
from chaccu.engine.transformers import TransformersEngine
from chaccu.errors import EngineError

torch = pytest.importorskip("torch", reason="torch is not installed")
ANSWER = "Añil, 山 and 🦙 meet."
PROMPT = "what?"
BYTES = build_byte_tokenizer()


class Reciter:
    """Stands for a model: after the prompt it always gives the next byte of ANSWER, fed in one go or in steps."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=128))
        self.generation_config = SimpleNamespace(eos_token_id=BYTES.token_id("<|im_end|>"))
        self.device = torch.device("cpu")
        self.fails = False

    def __call__(self, *, input_ids: Any, past_key_values: int | None, **_: Any) -> Any:
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


async def test_a_closed_engine_refuses() -> None:
    engine = TransformersEngine(Reciter(), build_byte_backend(), EngineOptions())
    await engine.close()
    with pytest.raises(EngineError, match="closing"):
        await pieces(engine)
