"""Adapters by name over one base: each answer as the merged model gives it, the base's own as without any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from chaccu.artifact import Manifest, write_manifest
from chaccu.engine import AdapterEngine, Engine, EngineOptions, GenerationRequest, parse_adapter, resolve_adapter, resolve_model
from chaccu.engine.registry import load_engine
from chaccu.errors import ArtifactError, ChaccuError, EngineError, UsageError, WeightsError

pytest.importorskip("peft", reason="the train extra is not installed")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

from chaccu.engine.batching.batcher import Batcher
from chaccu.testing.tiny import build_adapter, build_llama, build_model
from chaccu.testing.tiny_gguf import write_llama_gguf
from chaccu.weights.adapter_gguf import write_adapter_gguf
from chaccu.weights.merge import merge_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPTS = ([60, 61, 90, 110, 75, 300, 301], [80, 81, 82, 83], [60, 61, 90, 110, 75, 120])
NAMES = (None, "one", "two.b")
OPTIONS = EngineOptions(threads=1, slots=4, context_tokens=256)


class AdaptedSubject(msgspec.Struct):
    """An engine with two adapters, and greedy answers by adapter and prompt of the models that merging makes."""

    name: str
    engine: Any
    adapters: dict[str, Path]
    merged: dict[tuple[str | None, int], str]


async def answer(engine: Engine, prompt: int, adapter: str | None = None, tokens: int = 12) -> str:
    request = GenerationRequest(id="r", prompt_ids=PROMPTS[prompt], temperature=0.0, max_tokens=tokens, adapter=adapter)
    return "".join([delta.text async for delta in engine.generate(request)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `one`, `two.b` and what merging makes of them, each as Hugging Face folder and GGUF."""
    root = tmp_path_factory.mktemp("models")
    # Wide weights, as random ones of the usual range hardly prefer any token.
    base = build_llama(root / "base", initializer_range=0.4)
    write_llama_gguf(base)
    for seed, name in enumerate(("one", "two.b")):
        build_adapter(root / name, base, seed=seed)
        write_adapter_gguf(root / name, base / "model.gguf", root / f"{name}-gguf", base=base)
        merge_adapter(base, root / name, root / f"{name}-merged")
        write_llama_gguf(root / f"{name}-merged")
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["transformers", "transformers as on CUDA", "llamacpp"])
async def subject(request: pytest.FixtureRequest, models: Path) -> AsyncIterator[AdaptedSubject]:
    name = request.param.removesuffix(" as on CUDA")
    with pytest.MonkeyPatch.context() as patch:
        if name != request.param:
            patch.setattr("chaccu.engine.batching.batcher.Batcher", partial(Batcher, graphed=True))
        async for one in adapted(name, models):
            yield one


async def adapted(engine_name: str, models: Path) -> AsyncIterator[AdaptedSubject]:
    engine_class = load_engine(engine_name)
    merged: dict[tuple[str | None, int], str] = {}
    for name, folder in {None: "base", "one": "one-merged", "two.b": "two.b-merged"}.items():
        engine = await asyncio.to_thread(engine_class.load, resolve_model(str(models / folder)), OPTIONS)
        merged |= {(name, prompt): await answer(engine, prompt) for prompt in range(len(PROMPTS))}
        await engine.close()
    suffix = "-gguf" if engine_name == "llamacpp" else ""
    adapters = {name: models / f"{name}{suffix}" for name in ("one", "two.b")}
    source = resolve_model(str(models / "base"))
    engine = await asyncio.to_thread(engine_class.load, source, OPTIONS)
    assert isinstance(engine, AdapterEngine)
    for name, folder in adapters.items():
        await engine.load_adapter(resolve_adapter(name, folder, source))
    yield AdaptedSubject(engine_name, engine, adapters, merged)
    await engine.close()


async def test_answers_are_those_of_the_merged_model_and_the_base_s_own(subject: AdaptedSubject) -> None:
    assert len(set(subject.merged.values())) > 6
    for (name, prompt), expected in subject.merged.items():
        assert await answer(subject.engine, prompt, name) == expected


async def test_base_and_adapters_are_answered_at_the_same_time(subject: AdaptedSubject) -> None:
    asked = [(name, prompt) for prompt in range(len(PROMPTS)) for name in NAMES]
    said = await asyncio.gather(*(answer(subject.engine, prompt, name) for name, prompt in asked))
    assert dict(zip(asked, said, strict=True)) == subject.merged


async def test_a_long_answer_of_one_does_not_hold_up_another(subject: AdaptedSubject) -> None:
    request = GenerationRequest(
        id="long", prompt_ids=PROMPTS[0], temperature=0.0, max_tokens=240, logit_bias=dict.fromkeys((0, 1, 3), -100.0)
    )
    long = subject.engine.generate(request)
    await anext(long)
    began = asyncio.create_task(answer(subject.engine, 0, "one", tokens=4))
    pieces = 1
    async for _ in long:
        pieces += 1
        if began.done():
            break
    assert began.done()
    assert pieces < 200
    await long.aclose()


async def test_vectors_go_through_the_adapter(subject: AdaptedSubject, models: Path) -> None:
    engine = await asyncio.to_thread(load_engine(subject.name).load, resolve_model(str(models / "one-merged")), OPTIONS)
    (expected,) = await engine.embed([PROMPTS[0]])
    await engine.close()
    base, adapted = [(await subject.engine.embed([PROMPTS[0]], name))[0] for name in (None, "one")]
    assert adapted == pytest.approx(expected, abs=1e-4)
    assert base != pytest.approx(expected, abs=1e-2)


async def test_an_adapter_is_unloaded_and_loaded_while_others_answer(subject: AdaptedSubject, models: Path) -> None:
    source = resolve_model(str(models / "base"))
    running = [asyncio.create_task(answer(subject.engine, prompt, name)) for prompt in (0, 1) for name in (None, "one")]
    await subject.engine.unload_adapter("two.b")
    await subject.engine.load_adapter(resolve_adapter("again", subject.adapters["two.b"], source))
    assert await answer(subject.engine, 0, "again") == subject.merged["two.b", 0]
    assert await asyncio.gather(*running) == [subject.merged[name, prompt] for prompt in (0, 1) for name in (None, "one")]
    await subject.engine.unload_adapter("again")
    await subject.engine.load_adapter(resolve_adapter("two.b", subject.adapters["two.b"], source))
    await subject.engine.unload_adapter("one")
    assert await answer(subject.engine, 1, "two.b") == subject.merged["two.b", 1]
    assert await answer(subject.engine, 1) == subject.merged[None, 1]
    await subject.engine.load_adapter(resolve_adapter("one", subject.adapters["one"], source))
    assert await answer(subject.engine, 2, "one") == subject.merged["one", 2]


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_hidden_layers": 3}], ids=str)
async def test_an_adapter_of_another_base_is_refused_and_changes_nothing(
    subject: AdaptedSubject, models: Path, tmp_path: Path, changes: dict[str, int]
) -> None:
    other = build_llama(tmp_path / "other", **changes)
    write_llama_gguf(other)
    adapter = build_adapter(tmp_path / "adapter", other)
    if subject.name == "llamacpp":
        write_adapter_gguf(adapter, other / "model.gguf", tmp_path / "gguf")
        adapter = tmp_path / "gguf"
    source = resolve_model(str(models / "base"))
    with pytest.raises(WeightsError, match="another base"):
        resolve_adapter("foreign", adapter, source)
    # Without a manifest its shapes tell.
    (adapter / "manifest.json").unlink()
    with pytest.raises(EngineError, match=r"of other|another model|no layer|is for a layer of"):
        await subject.engine.load_adapter(resolve_adapter("foreign", adapter, source))
    assert await answer(subject.engine, 0, "one") == subject.merged["one", 0]
    assert await answer(subject.engine, 0) == subject.merged[None, 0]


async def test_an_engine_says_what_it_lacks(subject: AdaptedSubject, models: Path) -> None:
    wrong = models / ("one" if subject.name == "llamacpp" else "one-gguf")
    with pytest.raises(EngineError, match=r"which (llama.cpp|transformers) needs"):
        await subject.engine.load_adapter(resolve_adapter("x", wrong, resolve_model(str(models / "base"))))


async def first_logprobs(engine: Engine, adapter: str | None = None) -> list[float]:
    """Of the likeliest tokens at the first two places."""
    request = GenerationRequest(id="r", prompt_ids=PROMPTS[0], temperature=0.0, max_tokens=2, top_logprobs=8, adapter=adapter)
    return [value async for delta in engine.generate(request) for one in delta.logprobs for _, value in one.top]


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("gemma-3", True), ("distilgpt2", True)])
async def test_rows_of_tokens_are_each_adapter_s_own(tmp_path: Path, architecture: str, tied: bool) -> None:
    """Untied, tied with an embedding that scales, and layers of Conv1D; two adapters with rows and one without in a batch."""
    base = build_model(tmp_path / "base", architecture, initializer_range=0.1, tie_word_embeddings=tied)
    engine_class, source = load_engine("transformers"), resolve_model(str(base))
    rows: dict[str, list[int] | None] = {"a": [60, 61, 120, 300], "b": [61, 90], "c": None}
    expected: dict[str | None, list[float]] = {}
    for seed, (name, tokens) in enumerate(rows.items()):
        build_adapter(tmp_path / name, base, seed=seed, token_rows=tokens)
        merge_adapter(base, tmp_path / name, tmp_path / f"{name}-merged")
    for name, folder in {None: "base", **{name: f"{name}-merged" for name in rows}}.items():
        merged = await asyncio.to_thread(
            engine_class.load, resolve_model(str(tmp_path / folder), chat_format="chatml"), OPTIONS
        )
        expected[name] = await first_logprobs(merged)
        await merged.close()
    engine: Any = await asyncio.to_thread(engine_class.load, source, OPTIONS)
    for name in rows:
        await engine.load_adapter(resolve_adapter(name, tmp_path / name, source))
    said = await asyncio.gather(*(first_logprobs(engine, name) for name in expected))
    for name, logprobs in zip(expected, said, strict=True):
        assert logprobs == pytest.approx(expected[name], abs=1e-3), name
        assert all(other == name or expected[other] != pytest.approx(logprobs, abs=0.02) for other in expected)
    for name in rows:
        await engine.unload_adapter(name)
    assert await first_logprobs(engine) == expected[None]
    await engine.close()


def spoil(adapter: Path, text: str, new: str) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace(text, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (lambda folder: spoil(folder, '"use_dora": false', '"use_dora": true'), EngineError, "uses use_dora"),
        (lambda folder: spoil(folder, '"bias": "none"', '"bias": "all"'), EngineError, "with bias all"),
        (lambda folder: spoil(folder, '"r": 4', '"r": 8'), EngineError, "peft cannot load"),
        (lambda folder: spoil(folder, "0.self_attn.q_proj", "0.self_attn.no_proj"), EngineError, "no place for .*q_proj"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), EngineError, "holds no LoRA adapter"),
        (lambda folder: (folder / "manifest.json").write_text("{", encoding="utf-8"), ArtifactError, "damaged"),
        (
            lambda folder: write_manifest(folder, Manifest(kind="adapter", name="x", facts={"config_changes": {"a": 1}})),
            EngineError,
            "positions stretched",
        ),
    ],
    ids=["dora", "bias", "rank", "targets", "missing", "manifest", "stretched"],
)
async def test_what_cannot_be_served_beside_others_is_refused(
    models: Path, tmp_path: Path, damage: Callable[[Path], object], error: type[ChaccuError], text: str
) -> None:
    source = resolve_model(str(models / "base"))
    adapter = build_adapter(tmp_path / "adapter", models / "base")
    damage(adapter)
    engine: Any = await asyncio.to_thread(load_engine("transformers").load, source, OPTIONS)
    try:
        with pytest.raises(error, match=text):
            await engine.load_adapter(resolve_adapter("x", adapter, source))
        before = await answer(engine, 0)
        await engine.load_adapter(resolve_adapter("one", models / "one", source))
        assert await answer(engine, 0) == before != await answer(engine, 0, "one")
    finally:
        await engine.close()


async def test_an_adapter_is_named_with_its_folder() -> None:
    assert parse_adapter("a=b/c=d") == ("a", Path("b/c=d"))
    for wrong in ("a", "=b", "a="):
        with pytest.raises(UsageError, match="names no adapter"):
            parse_adapter(wrong)
