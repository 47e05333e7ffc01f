"""Sample answers: whose questions, where they end, and that training does not notice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.conversation import ChatFormat, Conversation, Message, TextTokenizer, encode_conversation, load_format
from chaccu.testing.tiny import ARCHITECTURES, build_model
from chaccu.train.encode import encode_sources
from chaccu.train.pack import pack_rows
from chaccu.train.recipe import DataSource, Recipe
from chaccu.train.report import SampleAnswer

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train.layers import compile_layers, find_layers  # noqa: E402 (torch may be absent)
from chaccu.train.loop import run_steps  # noqa: E402
from chaccu.train.model import TrainableModel  # noqa: E402
from chaccu.train.samples import SamplePrompt, Sampler, choose_prompts  # noqa: E402

CPU = torch.device("cpu")
CHATML = load_format("chatml")


def change(recipe: Recipe, **fields: Any) -> Recipe:
    return msgspec.structs.replace(recipe, **fields)


def ask(*questions: str, tokenizer: TextTokenizer, chat_format: ChatFormat = CHATML) -> list[SamplePrompt]:
    asked = [Conversation(messages=(Message("user", question),)) for question in questions]
    return [
        SamplePrompt(one.messages[0].content or "", encode_conversation(one, chat_format, tokenizer, pending=True).ids)
        for one in asked
    ]


def greedy(model: TrainableModel, prompt: Sequence[int], count: int) -> list[int]:
    """The most probable next token again and again, by the model's own logits over the whole text, without a cache."""
    ids = list(prompt)
    model.full.eval()
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    model.full.train()
    return ids[len(prompt) :]


@pytest.fixture
def tokenizer(llama: Path) -> TextTokenizer:
    return TextTokenizer.load(llama)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_answers_are_greedy_and_no_prompt_disturbs_another(recipe: Recipe, tokenizer: TextTokenizer, method: str) -> None:
    model = TrainableModel(change(recipe, method=method), CPU)
    prompts = ask("Sky?", "What colour is the sea that lies below the mountain?", tokenizer=tokenizer)
    answers = Sampler(model, prompts, CHATML, tokenizer, max_tokens=12).answer()
    for prompt, answer in zip(prompts, answers, strict=True):
        text, end, _ = tokenizer.decode(greedy(model, prompt.ids, 12)).partition("<|im_end|>")
        assert answer == SampleAnswer(prompt.question, text.strip(), bool(end))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_answers_as_its_own_logits_say(recipe: Recipe, tmp_path: Path, architecture: str) -> None:
    base = build_model(tmp_path / architecture, architecture)
    tokenizer = TextTokenizer.load(base)
    model = TrainableModel(change(recipe, model=str(base), method="full"), CPU)
    # Longer and shorter than the windows of 32.
    long = "What colour is the sea that lies below the mountain where the llama walked, and who saw it at noon?"
    prompts = ask(long, "Sky?", tokenizer=tokenizer)
    assert len(prompts[0].ids) > 32 > len(prompts[1].ids)
    answers = Sampler(model, prompts, CHATML, tokenizer, max_tokens=10).answer()
    for prompt, answer in zip(prompts, answers, strict=True):
        text, end, _ = tokenizer.decode(greedy(model, prompt.ids, 10)).partition("<|im_end|>")
        assert answer == SampleAnswer(prompt.question, text.strip(), bool(end))


def test_a_trained_model_ends_its_answer_at_the_end_of_turn(recipe: Recipe, tokenizer: TextTokenizer) -> None:
    recipe = change(recipe, num_train_epochs=30, max_steps=60, method="full", learning_rate=3e-3)
    encoded = encode_sources(recipe.data, CHATML, tokenizer, sequence_len=256, seed=0)
    model = TrainableModel(recipe, CPU)
    run_steps(model, pack_rows(encoded, 256, seed=0), recipe)
    sampler = Sampler(model, ask("What colour is the snow?", tokenizer=tokenizer), CHATML, tokenizer, max_tokens=64)
    (answer,) = sampler.answer()
    assert answer.ended
    assert answer.answer.startswith("The ")
    assert answer.answer.endswith(".")


@pytest.mark.parametrize(
    ("stop", "generated", "answer", "ended", "rest"),
    [
        ("<|im_end|>", "Blue.<|im_end|>\n<|im_start|>", "Blue.", True, "\n<|im_start|>"),
        ("\nUser:", " Blue.\nUser:<|im_end|>", "Blue.", True, "<|im_end|>"),
        ("\nUser:", "Blue.\nUse", "Blue.\nUse", False, ""),
    ],
)
def test_generation_ends_where_the_format_ends_a_turn(
    recipe: Recipe, tokenizer: TextTokenizer, stop: str, generated: str, answer: str, ended: bool, rest: str
) -> None:
    chat_format = msgspec.structs.replace(CHATML, stop=(stop,))
    model = TrainableModel(recipe, CPU)
    prompts = ask("Sky?", tokenizer=tokenizer)
    parts = tokenizer.split_control(generated)
    ids = [[part] if isinstance(part, int) else tokenizer.encode_texts([part], first=[False])[0] for part in parts]
    following = itertools.chain.from_iterable(ids)

    def generate(input_ids: Any, stopping_criteria: Any, **_: Any) -> Any:
        done = False
        while not done and (token := next(following, None)) is not None:
            input_ids = torch.cat([input_ids, torch.tensor([[token]])], dim=1)
            done = bool(stopping_criteria(input_ids, None).all())
        return input_ids

    model.causal.generate = generate
    (given,) = Sampler(model, prompts, chat_format, tokenizer, max_tokens=64).answer()
    assert (given.answer, given.ended) == (answer, ended)
    assert tokenizer.decode(following) == rest


@pytest.mark.parametrize("method", ["full", "lora"])
def test_sampling_leaves_the_model_as_it_was(recipe: Recipe, tokenizer: TextTokenizer, method: str) -> None:
    model = TrainableModel(change(recipe, method=method), CPU)
    state = torch.get_rng_state()
    attention = model.causal.config._attn_implementation
    Sampler(model, ask("Sky?", tokenizer=tokenizer), CHATML, tokenizer, max_tokens=4).answer()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.causal.config._attn_implementation == attention
    assert all(module.training for module in model.full.modules())
    assert all(parameter.grad is None for parameter in model.parameters)


def test_an_error_while_sampling_leaves_the_model_in_training(recipe: Recipe, tokenizer: TextTokenizer) -> None:
    model = TrainableModel(recipe, CPU)
    attention = model.causal.config._attn_implementation
    sampler = Sampler(model, [SamplePrompt("?", [10**6])], CHATML, tokenizer, max_tokens=4)
    with pytest.raises(IndexError):
        sampler.answer()
    assert model.full.training
    assert model.causal.config._attn_implementation == attention


def test_compiled_layers_are_not_compiled_for_sampling(
    recipe: Recipe, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compile_(forward, backend=backend, **options))
    model = TrainableModel(change(recipe, method="full"), CPU)
    row = pack_rows(encode_sources(recipe.data, CHATML, tokenizer, sequence_len=256, seed=0), 256, seed=0)[0]
    prompts = ask("Sky?", "What colour is the sea?", tokenizer=tokenizer)
    expected = Sampler(model, prompts, CHATML, tokenizer, max_tokens=6).answer()
    compile_layers(find_layers(model.causal), lean=False)
    with torch.no_grad():
        before = model.row_loss(row)
    graphs = len(compiled)
    assert graphs > 0
    assert Sampler(model, prompts, CHATML, tokenizer, max_tokens=6).answer() == expected
    with torch.no_grad():
        assert model.row_loss(row) == before
    assert len(compiled) == graphs


def test_questions_are_the_first_user_turns_of_held_out_conversations(
    recipe: Recipe, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    talks = [
        Conversation(messages=(Message("user", text), Message("assistant", "Yes."), Message("user", "Why?")))
        for text in "abcab"
    ]
    talks.append(Conversation(messages=(Message("user", "long " * 300), Message("assistant", "Yes."))))
    talks.append(Conversation(messages=(Message("user", "s"), Message("assistant", "Yes.")), system="Be brief."))
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"\n".join(map(msgspec.json.encode, talks)))
    recipe = change(recipe, validation=[DataSource(path=str(path))])
    prompts = choose_prompts(recipe, CHATML, tokenizer)
    assert sorted(prompt.question for prompt in prompts) == ["a", "b", "c", "s"]
    (with_system,) = (prompt for prompt in prompts if prompt.question == "s")
    assert "Be brief." in tokenizer.decode(with_system.ids)
    assert tokenizer.decode(with_system.ids).endswith("<|im_start|>assistant\n")
    assert choose_prompts(recipe, CHATML, tokenizer) == prompts
    assert len(choose_prompts(change(recipe, sample_answers=2), CHATML, tokenizer)) == 2


@pytest.mark.parametrize("off", [{"sample_answers": 0}, {"sample_tokens": 0}, {"validation": []}])
def test_samples_can_be_left_out(recipe: Recipe, tokenizer: TextTokenizer, off: dict[str, Any]) -> None:
    recipe = change(recipe, **off)
    assert choose_prompts(recipe, CHATML, tokenizer) == []
    assert Sampler(TrainableModel(recipe, CPU), [], CHATML, tokenizer, max_tokens=recipe.sample_tokens).answer() == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_on_a_gpu_compiled_layers_train_on_after_sampling_as_they_are(
    recipe: Recipe, tokenizer: TextTokenizer, method: str
) -> None:
    recipe = change(recipe, method=method, precision="bf16", compile=True)
    model = TrainableModel(recipe, torch.device("cuda"))
    row = pack_rows(encode_sources(recipe.data, CHATML, tokenizer, sequence_len=256, seed=0), 256, seed=0)[0]
    sampler = Sampler(model, ask("Sky?", "What colour is the sea?", tokenizer=tokenizer), CHATML, tokenizer, max_tokens=8)
    for _ in range(2):
        model.row_loss(row).backward()
    before = float(model.row_loss(row))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    answers = sampler.answer()
    assert len(answers) == 2
    assert float(model.row_loss(row)) == pytest.approx(before, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert sampler.answer() == answers
