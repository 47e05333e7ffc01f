"""A server's `/completions` as an engine: what it is sent, what becomes of its errors, and that leaving ends its work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from chaccu.conversation import Conversation, Message, TextTokenizer, load_format
from chaccu.engine import Engine, EngineLostError, EngineOptions, GenerationDelta, GenerationRequest, resolve_model
from chaccu.engine.openai import KEY_VARIABLE, OpenAIEngine
from chaccu.engine.scripted import build_byte_backend, build_byte_tokenizer
from chaccu.engine.server_text import hide_paths, tell_error
from chaccu.errors import EngineError, UsageError
from chaccu.serve.link import Generate, Sampling
from chaccu.serve.worker.prompt import PromptBuilder
from chaccu.testing.fake_completions import FakeCompletions, Fault

TEXT = "Añil and 🦙 meet by the river."
SPEC = f"scripted:parrot?text={TEXT}&tokens_per_s=300&context_tokens=200"
PROMPT = "Who are they?"


async def load(server: FakeCompletions, folder: Path | None = None, **options: Any) -> OpenAIEngine:
    """With the model's tokenizer in `folder`, or by the server's name for it alone."""
    if folder is not None:
        build_byte_backend().save(str(folder / "tokenizer.json"))
    spec = server.name if folder is None else str(folder)
    source = resolve_model(spec, name=server.name, chat_format="chatml", url=server.url)
    return await asyncio.to_thread(OpenAIEngine.load, source, EngineOptions(**options))


def ids_of(text: str) -> list[int]:
    return build_byte_tokenizer().encode_texts([text], first=[False])[0]


async def ask(engine: Engine, **fields: Any) -> list[GenerationDelta]:
    request = GenerationRequest(**{"id": "r", "prompt_ids": ids_of(PROMPT), "max_tokens": 50, **fields})
    return [delta async for delta in engine.generate(request)]


@pytest.mark.parametrize("owner", ["vllm", "llamacpp", ""])
async def test_a_server_that_takes_ids_gets_ids_and_all_of_the_sampling(tmp_path: Path, owner: str) -> None:
    with FakeCompletions(SPEC, owned_by=owner) as server:
        engine = await load(server, tmp_path, slots=3)
        assert (engine.info.context_tokens, engine.info.slots) == (200, 3)
        deltas = await ask(engine, temperature=0.7, top_p=0.9, seed=0, stop_ids=(257,), stop=("river",))
        await engine.close()
    assert "".join(delta.text for delta in deltas) == "Añil and 🦙 meet by the "
    assert (deltas[-1].finish_reason, deltas[-1].stopped_by) == ("stop", "river")
    sent = server.requests[-1]
    assert sent["prompt"] == ids_of(PROMPT)
    assert [sent[name] for name in ("temperature", "top_p", "seed", "max_tokens")] == [0.7, 0.9, 0, 50]
    # Servers known by name fill what is left out with settings of their own; others may not know it.
    assert sent.get("top_k") == (-1 if owner else None)
    assert sent.get("min_p") == (0.0 if owner else None)
    # Stop strings are found here; the ends of turns are the server's to find.
    assert sent.get("stop_token_ids") == ([257] if owner == "vllm" else None)
    assert sent.get("stop") == (None if owner == "vllm" else ["<|im_end|>"])


@pytest.mark.parametrize("knows_tokenizer", [True, False])
async def test_a_server_without_ids_gets_the_rendered_text(tmp_path: Path, knows_tokenizer: bool) -> None:
    conversation = Conversation(messages=(Message("user", PROMPT), Message("assistant", None)))
    builder = PromptBuilder(load_format("chatml"), build_byte_tokenizer())
    prompt = builder.build(Generate(request=1, model="parrot", conversation=conversation, sampling=Sampling()))
    with FakeCompletions(SPEC, takes_ids=False) as server:
        engine = await load(server, tmp_path if knows_tokenizer else None)
        deltas = await ask(engine, prompt_ids=prompt.prompt_ids, reply_ids=ids_of(TEXT[:9]))
        await engine.close()
    assert "".join(delta.text for delta in deltas) == TEXT[9:]
    rendered = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert server.requests[-1]["prompt"].endswith(rendered + TEXT[:9])
    usage = deltas[-1].usage
    assert usage is not None
    if knows_tokenizer:
        assert usage.prompt_tokens == len(prompt.prompt_ids)
    else:  # a share of what the server has counted
        assert len(prompt.prompt_ids) < usage.prompt_tokens < len(f"{rendered}{TEXT[:9]}")
    assert usage.completion_tokens == sum(delta.tokens for delta in deltas) > 3


async def test_a_text_has_no_bos_of_ours(tmp_path: Path) -> None:
    # Servers put one before a text.
    from chaccu.testing.tiny import build_tokenizer

    tokenizer: TextTokenizer = build_tokenizer(tmp_path)
    with FakeCompletions(SPEC, takes_ids=False) as server:
        source = resolve_model(str(tmp_path), name=server.name, chat_format="gemma-3", url=server.url)
        engine = await asyncio.to_thread(OpenAIEngine.load, source, EngineOptions())
        assert tokenizer.bos_id is not None
        await ask(engine, prompt_ids=[tokenizer.bos_id, *tokenizer.encode_texts([PROMPT], first=[False])[0]])
        await engine.close()
    assert server.requests[-1]["prompt"] == PROMPT


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCompletions(SPEC, key="s3cret") as server:
        with pytest.raises(EngineError, match="status 401: the key is not known"):
            await load(server)
        monkeypatch.setenv(KEY_VARIABLE, "s3cret")
        engine = await load(server)
        assert "".join(delta.text for delta in await ask(engine)) == TEXT
        await engine.close()


async def test_what_is_wrong_with_the_server_is_said_at_the_start() -> None:
    with FakeCompletions(SPEC) as server:
        source = resolve_model("llama", chat_format="chatml", url=server.url)
        with pytest.raises(EngineError, match="has no model 'llama'; it serves: parrot"):
            await asyncio.to_thread(OpenAIEngine.load, source, EngineOptions())
    with pytest.raises(EngineError, match="not reachable"):
        await load(server)
    with pytest.raises(UsageError, match="is no URL"):
        OpenAIEngine.load(resolve_model("llama", chat_format="chatml", url="host:80"), EngineOptions())
    with pytest.raises(UsageError, match="never guessed"):
        resolve_model("llama", url=server.url)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("refuse", EngineError, "refused the request: failed in …: no memory"),
        ("event", EngineError, "failed while generating: failed in …: no memory"),
        ("unfinished", EngineError, "without saying that the answer is complete"),
        ("cut", EngineLostError, "connection to the server broke"),
    ],
)
async def test_a_failing_answer_is_an_error_with_the_servers_words(fault: Fault, error: type[EngineError], words: str) -> None:
    with FakeCompletions(SPEC) as server:
        engine = await load(server)
        server.fault = fault
        with pytest.raises(EngineError, match=words) as caught:
            await ask(engine)
        assert type(caught.value) is error
        assert server.url not in str(caught.value)
        server.fault = None
        assert "".join(delta.text for delta in await ask(engine)) == TEXT
        await engine.close()


async def test_leaving_ends_the_servers_work_within_100_ms() -> None:
    with FakeCompletions("scripted:parrot?tokens=100&tokens_per_s=50") as server:
        engine = await load(server)
        request = GenerationRequest(id="r", prompt_ids=ids_of(PROMPT), max_tokens=100)
        stream: AsyncIterator[GenerationDelta] = engine.generate(request)
        await anext(stream)
        began = time.monotonic()
        await stream.aclose()
        while not server.cancelled:
            assert time.monotonic() - began < 0.1
            await asyncio.sleep(0.005)
        await engine.close()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b'{"error": {"message": "no room in /var/lib/x/y.bin, ask later"}}', "no room in …, ask later"),
        (b'{"detail": "Traceback in C:\\\\models\\\\a.py"}', "Traceback in …"),
        (b"plain words and a rate of 3/4 tokens/s", "plain words and a rate of 3/4 tokens/s"),
        (b'{"message": "see https://example.org/a/b and ~/cache/x"}', "see https://example.org/a/b and …"),
    ],
)
def test_errors_are_told_without_paths(said: bytes, told: str) -> None:
    assert tell_error(said) == told
    assert len(hide_paths("x" * 5000)) == 300
