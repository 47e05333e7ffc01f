"""Data that cannot teach a model to stop, and tokens that it does not have, are refused before the first step."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.conversation import Conversation, Encoded, Message, TextTokenizer, encode_conversations, list_formats, load_format
from chaccu.errors import TrainError
from chaccu.testing.tiny import build_tokenizer
from chaccu.train.pack import TokenSequence
from chaccu.train.preflight import check_stop_trained, check_vocabulary, find_stop_id
from chaccu.train.recipe import DataSource, LoraOptions, Recipe

CHATML = load_format("chatml")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encode(tokenizer: TextTokenizer, *messages: Message) -> Encoded:
    return encode_conversations([Conversation(messages=messages)], CHATML, tokenizer)[0]


@pytest.mark.parametrize(
    ("name", "stop"),
    [("chatml", "<|im_end|>"), ("gemma-3", "<end_of_turn>"), ("vicuna_v1.1", "<|im_end|>"), ("vicuna_v0", ""), ("raw", "")],
)
def test_the_stop_token_is_the_control_token_behind_a_reply(tokenizer: TextTokenizer, name: str, stop: str) -> None:
    found = find_stop_id(load_format(name), tokenizer)
    assert (tokenizer.token_text(found) if found is not None else "") == stop


@pytest.mark.parametrize("name", list_formats())
def test_one_whole_reply_is_enough_in_every_format(tokenizer: TextTokenizer, name: str) -> None:
    chat_format = load_format(name)
    probe = Conversation(messages=(Message("user", "Hello"), Message("assistant", "Yes.")))
    check_stop_trained(encode_conversations([probe], chat_format, tokenizer), chat_format, tokenizer)


def test_a_stop_token_that_is_never_trained_stops_the_run_by_name(tokenizer: TextTokenizer) -> None:
    cut = encode(tokenizer, Message("user", "Hello"), Message("assistant", "A reply that", unfinished=True))
    assert any(cut.mask)
    with pytest.raises(TrainError, match=r"'<\|im_end\|>'.* none of 2 conversations and read 2 times(.|\n)*whole replies"):
        check_stop_trained([cut, cut], CHATML, tokenizer)
    whole = encode(tokenizer, Message("user", "Hello"), Message("assistant", "Yes."))
    check_stop_trained([cut, TokenSequence(array("i", whole.ids), array("b", whole.mask))], CHATML, tokenizer)


def test_tokens_beyond_the_model_are_named_with_figures(tokenizer: TextTokenizer) -> None:
    row = encode(tokenizer, Message("user", "Hello"), Message("assistant", "Yes."))
    largest = max(row.ids)
    check_vocabulary([row], tokenizer, largest + 1)
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    with pytest.raises(TrainError) as caught:
        check_vocabulary([row, Encoded([0], [1], ())], tokenizer, end)
    for part in (f"has {end} tokens", f"tokenizer {tokenizer.vocab_size}", "1 of 2 conversations", f"'<|im_end|>' ({end})"):
        assert part in str(caught.value)


def test_a_tokenizer_with_tokens_that_no_conversation_has_is_fine(recipe: Recipe, tmp_path: Path) -> None:
    """Gemma 3's own has one more than its text models."""
    train = pytest.importorskip("chaccu.train.run", reason="torch is not installed").train
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(recipe.model)
    for kept, stops in ((-1, False), (100, True)):
        folder = tmp_path / f"base{kept}"
        used = TextTokenizer.load(Path(recipe.model)).vocab_size + kept if kept < 0 else kept
        model.resize_token_embeddings(used)
        model.save_pretrained(folder)
        for file in Path(recipe.model).glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
        changed = msgspec.structs.replace(recipe, model=str(folder), format="chatml", max_steps=1, output=str(folder) + "-out")
        if stops:
            with pytest.raises(TrainError, match="the model has 100 tokens"):
                train(changed)
        else:
            assert train(changed).steps == 1


def test_windows_that_all_end_inside_a_reply_stop_a_run(recipe: Recipe, tmp_path: Path) -> None:
    train = pytest.importorskip("chaccu.train.run", reason="torch is not installed").train
    cut = Conversation(messages=(Message("user", "Hello"), Message("assistant", "A reply that", unfinished=True)), id="cut")
    (tmp_path / "cut.jsonl").write_bytes(msgspec.json.encode(cut))
    with pytest.raises(TrainError, match="never learn to stop"):
        train(msgspec.structs.replace(recipe, data=[DataSource(path=str(tmp_path / "cut.jsonl"))]))


@pytest.mark.parametrize("trainable", [[], ["<bos>"]])
def test_a_list_that_leaves_an_unlearnable_token_out_stops_a_run(recipe: Recipe, tmp_path: Path, trainable: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from chaccu.train.run import train

    model = transformers.AutoModelForCausalLM.from_pretrained(recipe.model)
    tokenizer = TextTokenizer.load(Path(recipe.model))
    end, other = (tokenizer.token_id(text) for text in ("<|im_end|>", "<start_of_turn>"))
    assert end is not None
    changed = msgspec.structs.replace(recipe, max_steps=1, lora=LoraOptions(trainable_tokens=trainable))
    # As the tiny model is, its rows are told apart.
    assert train(changed).steps == 1
    with torch.no_grad():
        model.get_output_embeddings().weight[end] = model.get_output_embeddings().weight[other]
    folder = tmp_path / "unlearnable"
    model.save_pretrained(folder)
    for file in Path(recipe.model).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    refused = msgspec.structs.replace(changed, model=str(folder), format="chatml", output=str(tmp_path / "o2"))
    with pytest.raises(TrainError, match=rf"'<\|im_end\|>' \(token {end}\)(.|\n)*trainable_tokens: auto"):
        train(refused)
    assert train(msgspec.structs.replace(refused, lora=LoraOptions())).token_rows == ["<|im_end|>"]
    assert train(msgspec.structs.replace(refused, method="full", output=str(tmp_path / "o3"))).steps == 1
