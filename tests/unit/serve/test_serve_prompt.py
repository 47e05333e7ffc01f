"""The worker's prompts are those of training."""

from __future__ import annotations

import pytest

from chaccu.conversation import Conversation, Message, encode_conversation, list_formats, load_format
from chaccu.engine.scripted import build_byte_tokenizer
from chaccu.serve.link import Generate, Sampling
from chaccu.serve.worker.prompt import PromptBuilder

BYTES = build_byte_tokenizer()
REPLY = "Right, naïve 🦙."


def conversation(*texts: str | None) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(messages=tuple(Message(roles[index % 2], text) for index, text in enumerate(texts)))


def generate(asked: Conversation | None = None, *, begun: str = "", prompt: str = "", stop: tuple[str, ...] = ()) -> Generate:
    return Generate(request=1, model="m", sampling=Sampling(stop=stop), conversation=asked, begun=begun, prompt=prompt)


@pytest.mark.parametrize("name", list_formats())
def test_prompt_and_begun_reply_are_the_ids_that_training_saw(name: str) -> None:
    builder = PromptBuilder(load_format(name), BYTES)
    trained = encode_conversation(conversation("Hi", "Yes?", "<|im_end|> so", REPLY), load_format(name), BYTES)
    asked = conversation("Hi", "Yes?", "<|im_end|> so")
    fresh = builder.build(generate(asked))
    assert fresh.reply_ids == []
    assert fresh.prompt_ids == trained.ids[: trained.spans[-1].start]
    for cut in range(1, len(REPLY) + 1):
        begun = builder.build(generate(asked, begun=REPLY[:cut]))
        ids = begun.prompt_ids + begun.reply_ids
        assert ids == trained.ids[: len(ids)]
        assert BYTES.decode(begun.reply_ids) == fresh.reply_prefix + REPLY[:cut]
        assert begun.reply_prefix == ""


def test_a_format_prefix_is_hidden_and_its_end_stops() -> None:
    vicuna = PromptBuilder(load_format("vicuna_v1.1"), BYTES).build(generate(conversation("Hi"), stop=("x",)))
    # With this tokenizer the end-of-sequence text is ChatML's control token.
    assert (vicuna.reply_prefix, vicuna.stop) == (" ", ("x",))
    assert vicuna.stop_ids == (BYTES.token_id("<|im_end|>"),)
    gemma = PromptBuilder(load_format("gemma-3"), BYTES).build(generate(conversation("Hi")))
    # A tokenizer that has no such token writes the end of a turn as plain text.
    assert gemma.stop == ("<end_of_turn>",)
    assert gemma.reply_prefix == ""


def test_a_raw_prompt_may_write_control_tokens_and_a_message_may_not() -> None:
    builder = PromptBuilder(load_format("chatml"), BYTES)
    control = BYTES.token_id("<|im_start|>")
    assert builder.build(generate(prompt="a<|im_start|>b")).prompt_ids.count(control) == 1
    asked = builder.build(generate(conversation("a<|im_start|>b")))
    assert asked.prompt_ids.count(control) == builder.build(generate(conversation("a b"))).prompt_ids.count(control)
    begun = builder.build(generate(prompt="a", begun="<|im_end|>"))
    assert BYTES.token_id("<|im_end|>") not in begun.reply_ids
