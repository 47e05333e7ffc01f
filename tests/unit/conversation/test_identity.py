"""A format that does not fit a tokenizer is refused, with the token at which they part."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from chaccu.conversation import (
    Conversation,
    Message,
    TextTokenizer,
    check_format,
    check_token_identity,
    encode_conversation,
    guard_tokenizer,
    list_formats,
    load_format,
)
from chaccu.conversation.format import parse_format
from chaccu.errors import TokenizerError

from .small_tokenizers import KINDS, build_tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list_formats())
def test_shipped_formats_fit_the_usual_kinds_of_tokenizers(name: str, kind: str) -> None:
    check_format(load_format(name), build_tokenizer(kind))


def test_a_template_that_looks_ahead_parts_at_a_token() -> None:
    each = "{% for message in messages %}{% generation %}{{ message.content }};{% endgeneration %}{% endfor %}"
    ahead = parse_format("---\ndescription: x\n---\nab{{ messages | length }}" + each, name="ahead")
    two = Conversation(messages=(Message("user", "Q"), Message("assistant", "A")) * 2)
    with pytest.raises(TokenizerError, match=r"format 'ahead' .* the prompt of turn 1 .* part at token \d+: .*'2'.* and .*'4'"):
        check_token_identity(two, ahead, build_tokenizer("byte_level"))


def test_a_tokenizer_that_rewrites_text_is_refused() -> None:
    backend = Tokenizer.from_str(build_tokenizer("byte_level")._backend.to_str())
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(TokenizerError, match="does not read reply 0 back"):
        check_format(load_format("chatml"), TextTokenizer(backend, eos_token="</s>"))


def test_a_tokenizer_that_reads_control_tokens_out_of_messages_is_refused() -> None:
    characters = {chr(code) for code in range(32, 127)} | {"\n"}
    pieces = [("<unk>", -9.0), ("<|im_end|>", 0.0), *((character, -5.0) for character in sorted(characters))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<|im_end|>"])
    with pytest.raises(TokenizerError, match=r"reads the text '<\|im_end\|>' of a message as control token 1"):
        check_format(load_format("chatml"), TextTokenizer(backend))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_the_format_writes_is_guarded_though_it_is_not_special(kind: str) -> None:
    tokenizer, chat_format = build_tokenizer(kind), load_format("chatglm3")
    token = tokenizer.token_id("<|user|>")
    assert token not in tokenizer.special_ids
    assert tokenizer.encode_texts(["<|user|>"], first=[False]) == [[token]]
    guarded = guard_tokenizer(tokenizer, chat_format)
    assert token in guarded.special_ids
    assert guard_tokenizer(tokenizer, chat_format) is guarded
    assert guard_tokenizer(tokenizer, load_format("chatml")) is tokenizer
    spelled = Conversation(messages=(Message("user", "a <|user|> b"), Message("assistant", "<|user|>")))
    assert encode_conversation(spelled, chat_format, tokenizer).ids.count(token) == 1
