"""Answers stepped in one batch: each says what it would say alone, whatever joins, leaves or fails beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from chaccu.engine import EngineLostError, GenerationRequest
from chaccu.engine.batching.tasks import Answer, Task, Words
from chaccu.engine.scripted import build_byte_backend
from chaccu.errors import EngineError
from chaccu.testing.tiny import ARCHITECTURES, build_model

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# Longer than the sliding windows (32) too, and of one token.
LENGTHS = (20, 3, 47, 1, 90, 33)
NEW_TOKENS = 12
# With narrow weights, or a projection tied to the embedding, a random model says one token over and over.
WIDE = {"initializer_range": 0.3, "tie_word_embeddings": False}


class Recorded(Answer):
    """An answer that keeps its tokens."""

    def __init__(self, prompt_ids: list[int], **fields: Any) -> None:
        settings = {"temperature": 0.0, "max_tokens": NEW_TOKENS, **fields}
        request = GenerationRequest(id="r", prompt_ids=prompt_ids, **settings)
        super().__init__(request, request.max_tokens or 1, set(), Words(build_byte_backend(), set()))
        self.tokens: list[int] = []

    def take(self, token: int, logprob: Any) -> bool:
        self.tokens.append(token)
        return super().take(token, logprob)


class StepClock:
    """Each look at it takes `step_s`."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Models by architecture; their answers vary."""
    loaded: dict[str, Any] = {}

    def load_one(architecture: str, **fields: Any) -> Any:
        key = f"{architecture} {fields}"
        if key not in loaded:
            folder = build_model(tmp_path_factory.mktemp("model"), architecture, **{**WIDE, **fields})
            loaded[key] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return loaded[key]

    return load_one


@pytest.fixture(params=["aligned", "graphed"])
def make_batcher(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """With the cache of CUDA devices too, whose steps are the same without a graph."""
    from chaccu.engine.batching.batcher import Batcher

    return partial(Batcher, max_rows=8, graphed=request.param == "graphed")


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed + 100 * length)
    return torch.randint(10, 300, (length,), generator=generator).tolist()


def errors_of(task: Task) -> list[Exception]:
    sent = []
    while not task.sent.empty():
        sent.append(task.sent.get_nowait())
    return [one for one in sent if isinstance(one, Exception)]


def check_greedy(model: Any, answer: Recorded) -> None:
    """Every token is the likeliest behind those before it, by one pass without a cache; ties may fall either way."""
    ids = answer.request.prompt_ids + answer.tokens
    with torch.inference_mode():
        logits_TV = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    for place, token in enumerate(answer.tokens, start=len(answer.request.prompt_ids) - 1):
        assert logits_TV[place, token] >= logits_TV[place].max() - 1e-3


async def run(batcher: Any, arrivals: list[tuple[int, Task]]) -> None:
    """Add each task before the round with its number; go on until all is done."""
    for number in range(1000):
        for when, task in arrivals:
            if when == number:
                batcher.add(task)
        if number > max(when for when, _ in arrivals) and not batcher.tasks:
            await asyncio.sleep(0)
            return
        batcher.run_round()
    raise AssertionError("not done after 1,000 rounds")


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
async def test_answers_are_those_of_one_at_a_time(
    make_batcher: Callable[..., Any], load: Callable[..., Any], architecture: str
) -> None:
    model = load(architecture)
    batcher = make_batcher(model)
    assert batcher.is_joint
    # Some join while others run, some leave early; lengths differ, so rows have empty columns and shift.
    answers = [Recorded(prompt(length), max_tokens=NEW_TOKENS + 9 * (row % 3)) for row, length in enumerate(LENGTHS)]
    await run(batcher, [(3 * row, answer) for row, answer in enumerate(answers)])
    for answer in answers:
        assert len(answer.tokens) == answer.request.max_tokens
        assert len(set(answer.tokens)) > 3
        check_greedy(model, answer)


@pytest.mark.gpu
async def test_steps_out_of_graphs_say_what_the_model_says(load: Callable[..., Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from chaccu.engine.batching.batcher import Batcher
    from chaccu.engine.batching.graphed_cache import GraphedCache

    model = load("llama").to("cuda")
    try:
        batcher = Batcher(model, max_rows=8)
        # Past 256 columns, where buffers grow and graphs are made anew, with rows that come and go.
        answers = [Recorded(prompt(length), max_tokens=60 + 120 * (row % 3)) for row, length in enumerate(LENGTHS)]
        await run(batcher, [(11 * row, answer) for row, answer in enumerate(answers)])
        assert isinstance(batcher._graphed, GraphedCache)
        assert any(graph.logits_RV is not None for graph in batcher._graphed._graphs.values())
        for answer in answers:
            assert len(answer.tokens) == answer.request.max_tokens
            check_greedy(model, answer)
    finally:
        model.to("cpu")


def test_only_models_that_agree_are_stepped_as_graphs_are(load: Callable[..., Any]) -> None:
    from chaccu.engine.batching.graphed_cache import suits

    class Deaf(Watched):
        """Sees columns that the mask hides."""

        def __call__(self, **inputs: Any) -> Any:
            return super().__call__(**{name: value for name, value in inputs.items() if name != "attention_mask"})

    for architecture in ("llama", "distilgpt2", "qwen2", "qwen3"):
        model = load(architecture)
        assert suits(model, model.config.num_hidden_layers)
    assert not suits(Deaf(load("llama")), 2)
    assert not suits(load("llama"), 1)


class Watched:
    """A model that keeps the shapes of what it is given."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config, self.device, self.forward = model.config, model.device, model.forward
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, **inputs: Any) -> Any:
        self.shapes.append(tuple(inputs["input_ids"].shape))
        return self._model(**inputs)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
async def test_prompts_of_about_one_length_are_read_in_one_pass(
    make_batcher: Callable[..., Any], load: Callable[..., Any], architecture: str
) -> None:
    model = Watched(load(architecture))
    answers = [Recorded(prompt(length, seed)) for seed, length in enumerate((40, 44, 3, 38, 1, 3))]
    batcher = make_batcher(model)
    model.shapes.clear()
    await run(batcher, [(0, answer) for answer in answers])
    # Of the first chunk, 128 tokens: without the last of each, which the common step reads; the 38 are what is left.
    assert model.shapes[:3] == [(2, 43), (2, 2), (1, 38)]
    for answer in answers:
        assert len(answer.tokens) == NEW_TOKENS
        check_greedy(load(architecture), answer)


async def test_the_event_loop_is_woken_once_a_step(
    make_batcher: Callable[..., Any], load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = make_batcher(load("llama"))
    answers = [Recorded(prompt(20, seed), max_tokens=100) for seed in range(3)]
    for answer in answers:
        batcher.add(answer)
    batcher.run_round()
    wakes: list[Any] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", lambda *called: wakes.append(called))
    for _ in range(10):
        before = [len(answer.tokens) for answer in answers]
        batcher.run_round()
        assert [len(answer.tokens) for answer in answers] == [count + 1 for count in before]
    assert 1 <= len(wakes) <= 10


async def test_a_batch_outgrows_its_buffers_and_its_window(make_batcher: Callable[..., Any], load: Callable[..., Any]) -> None:
    model = load("gemma-3")
    batcher = make_batcher(model)
    answers = [Recorded(prompt(length), max_tokens=tokens) for length, tokens in ((5, 150), (70, 30), (130, 100), (9, 4))]
    await run(batcher, [(row * 10, answer) for row, answer in enumerate(answers)])
    for answer in answers:
        check_greedy(model, answer)


async def test_a_seed_repeats_whatever_runs_beside_it(make_batcher: Callable[..., Any], load: Callable[..., Any]) -> None:
    model = load("llama")
    settings = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 20}
    alone = Recorded(prompt(20), seed=7, **settings)
    await run(make_batcher(model), [(0, alone)])
    same = [Recorded(prompt(20), seed=7, **settings), Recorded(prompt(20), seed=7, frequency_penalty=1e-9, **settings)]
    others = [Recorded(prompt(length), seed=length, **{**settings, "temperature": 0.5 + length / 50}) for length in (3, 30, 8)]
    await run(make_batcher(model), [(0, others[0]), (1, same[0]), (2, others[1]), (2, same[1]), (5, others[2])])
    assert same[0].tokens == alone.tokens == same[1].tokens
    assert len({tuple(answer.tokens) for answer in (alone, *others)}) == 4


async def test_draws_follow_the_shares() -> None:
    from chaccu.engine.token_choice import TokenChooser, choose_tokens

    shares = [0.5, 0.0, 0.3, 0.2]
    logits_RV = torch.tensor([shares]).log().expand(2, -1)
    requests = [GenerationRequest(id="r", prompt_ids=[1], seed=seed) for seed in (1, 2)]
    choosers = [TokenChooser(request, torch.device("cpu"), lambda: None, ()) for request in requests]
    counts = [0] * 4
    for _ in range(1000):
        for token, _ in choose_tokens(choosers, logits_RV):
            counts[token] += 1
    assert counts[1] == 0
    assert [count / 2000 for count in counts] == pytest.approx(shares, abs=0.04)


async def test_a_long_prompt_is_read_in_chunks_beside_running_answers(
    make_batcher: Callable[..., Any], load: Callable[..., Any]
) -> None:
    batcher = make_batcher(load("llama"), clock=StepClock(1.0))  # reading takes ever too long: chunks shrink to the least
    running, long = Recorded(prompt(5), max_tokens=100), Recorded(prompt(400), max_tokens=3)
    batcher.add(running)
    batcher.run_round()
    batcher.add(long)
    rounds = 0
    while not long.tokens:
        before = len(running.tokens)
        batcher.run_round()
        rounds += 1
        assert len(running.tokens) == before + 1
    assert rounds > 10
    await run(batcher, [(0, Recorded(prompt(4)))])
    check_greedy(load("llama"), long)
    check_greedy(load("llama"), running)


async def test_a_short_prompt_does_not_wait_for_a_long_one(make_batcher: Callable[..., Any], load: Callable[..., Any]) -> None:
    batcher = make_batcher(load("llama"), clock=StepClock(1.0))
    long, short = Recorded(prompt(400)), Recorded(prompt(5))
    batcher.add(long)
    batcher.run_round()
    batcher.add(short)
    for _ in range(3):
        batcher.run_round()
    assert short.tokens
    assert not long.tokens


async def test_a_cancelled_answer_leaves_in_the_next_round(make_batcher: Callable[..., Any], load: Callable[..., Any]) -> None:
    model = load("llama")
    batcher = make_batcher(model)
    answers = [Recorded(prompt(length), max_tokens=40) for length in (20, 60, 7)]
    reading = Recorded(prompt(400), max_tokens=40)
    for answer in answers:
        batcher.add(answer)
    for _ in range(3):
        batcher.run_round()
    batcher.add(reading)
    for answer in (answers[1], reading):
        answer.cancelled = True
    said = len(answers[1].tokens)
    batcher.run_round()
    assert sorted(task.number for task in batcher.tasks) == [answers[0].number, answers[2].number]
    while batcher.tasks:
        batcher.run_round()
    assert len(answers[1].tokens) == said
    for answer in answers:
        check_greedy(model, answer)


class Fragile:
    """A model that fails in a layer's depth: with `error` where a row's newest id, or any of a prompt, is `poison`."""

    def __init__(self, model: Any, error: Exception, poison: int, max_rows: int = 99) -> None:
        self._model, self._error, self._poison, self._max_rows = model, error, poison, max_rows
        self.config, self.device, self.forward = model.config, model.device, model.forward

    def __call__(self, **inputs: Any) -> Any:
        ids_RT = inputs["input_ids"]
        output = self._model(**inputs)
        if (ids_RT == self._poison).any() or len(ids_RT) > self._max_rows:
            raise self._error
        return output


async def test_an_answer_that_fails_leaves_the_others_as_they_are(
    make_batcher: Callable[..., Any], load: Callable[..., Any]
) -> None:
    model = load("llama")
    alone = Recorded(prompt(20))
    await run(make_batcher(model), [(0, alone)])
    poison = alone.tokens[5]
    answers = [Recorded(prompt(length)) for length in (31, 20, 8)]
    batcher = make_batcher(Fragile(model, ValueError("bad weights"), poison))
    await run(batcher, [(0, answer) for answer in answers])
    assert answers[1].tokens == alone.tokens[:6]
    (error,) = errors_of(answers[1])
    assert isinstance(error, EngineError)
    assert "bad weights" in str(error)
    for answer in (answers[0], answers[2]):
        assert not errors_of(answer)
        assert len(answer.tokens) == NEW_TOKENS
        check_greedy(model, answer)
        check_greedy(model, answer)


async def test_a_prompt_that_fails_leaves_those_read_with_it(
    make_batcher: Callable[..., Any], load: Callable[..., Any]
) -> None:
    model = load("llama")
    answers = [Recorded(prompt(20, seed)) for seed in range(3)]
    poison = next(one for one in answers[1].request.prompt_ids if all(one not in prompt(20, seed) for seed in (0, 2)))
    await run(make_batcher(Fragile(model, ValueError("bad weights"), poison)), [(0, answer) for answer in answers])
    (error,) = errors_of(answers[1])
    assert "bad weights" in str(error)
    for answer in (answers[0], answers[2]):
        assert not errors_of(answer)
        check_greedy(model, answer)


async def test_out_of_memory_fails_the_newest_answer_alone(make_batcher: Callable[..., Any], load: Callable[..., Any]) -> None:
    model = load("llama")
    batcher = make_batcher(Fragile(model, torch.OutOfMemoryError("CUDA out of memory"), -1, max_rows=2))
    answers = [Recorded(prompt(length)) for length in (31, 20, 8)]
    await run(batcher, [(row, answer) for row, answer in enumerate(answers)])
    (error,) = errors_of(answers[2])
    assert "out of memory on cpu" in str(error)
    assert "--slots" in str(error)
    for answer in answers[:2]:
        assert not errors_of(answer)
        check_greedy(model, answer)


async def test_a_device_that_fails_is_a_lost_engine(make_batcher: Callable[..., Any], load: Callable[..., Any]) -> None:
    model = load("llama")
    alone = Recorded(prompt(20))
    await run(make_batcher(model), [(0, alone)])
    failure = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors …")
    batcher = make_batcher(Fragile(model, failure, alone.tokens[5]))
    with pytest.raises(EngineLostError, match="cpu has failed: CUDA error: an illegal memory access was encountered") as caught:
        await run(batcher, [(0, Recorded(prompt(length))) for length in (31, 20)])
    assert caught.value.needs_new_process


async def test_models_with_other_states_are_stepped_one_by_one(make_batcher: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.3,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    batcher = make_batcher(model)
    assert not batcher.is_joint
    answers = [Recorded(prompt(length)) for length in (20, 5)]
    await run(batcher, [(0, answers[0]), (2, answers[1])])
    for answer in answers:
        assert not errors_of(answer)
        assert len(answer.tokens) == NEW_TOKENS
        check_greedy(model, answer)
