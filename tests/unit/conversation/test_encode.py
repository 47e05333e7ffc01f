"""Token identity, masks and control text, for every shipped format with both kinds of tokenizers."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chaccu.conversation import (
    Conversation,
    Encoded,
    Message,
    encode_conversation,
    encode_conversations,
    list_formats,
    load_format,
)

from .small_tokenizers import CONTROL, KINDS, build_tokenizer

FORMATS = list_formats()
BOTH = [(name, kind) for name in FORMATS for kind in KINDS]

# The mark of SentencePiece is a space to it, wherever it comes from; all other characters come back as they were.
_plain = st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=12)
_tricky = st.sampled_from(
    [*CONTROL, " ", "\n", "\n\n", "  x", "\x00", "\x01\x02", "\x000\x00", "{{ system }}", "USER:", "é🦙", "▲"]
)
_text = st.lists(st.one_of(_plain, _tricky), max_size=4).map("".join)
_message = st.builds(Message, st.sampled_from(["user", "assistant"]), _text)
_conversation = st.builds(
    Conversation,
    messages=st.lists(_message, min_size=1, max_size=5).map(tuple),
    system=st.one_of(st.none(), _text),
)
_quick = settings(max_examples=60, deadline=None)


def encode(conversation: Conversation, name: str, kind: str, *, pending: bool | None = None) -> Encoded:
    return encode_conversation(conversation, load_format(name), build_tokenizer(kind), pending=pending)


def replies_of(conversation: Conversation) -> list[int]:
    """Indices of the assistant's messages."""
    return [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_ids_before_a_reply_are_those_of_the_conversation_that_awaits_it(name: str, kind: str) -> None:
    @_quick
    @given(_conversation)
    @example(Conversation(messages=(Message("user", "\n\n"), Message("assistant", "\n"), Message("user", ""))))
    def check(conversation: Conversation) -> None:
        encoded = encode(conversation, name, kind, pending=False)
        spans = {span.reply: span for span in encoded.spans}
        for reply, index in enumerate(replies_of(conversation)):
            awaited = encode(conversation.pending_at(index), name, kind)
            assert encoded.ids[: spans[reply].start] == awaited.ids
            shortened = msgspec.structs.replace(conversation, messages=conversation.messages[: index + 1])
            assert encode(shortened, name, kind, pending=True) == awaited

    check()


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_the_mask_is_the_replies_with_their_ends(name: str, kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    end_text = load_format(name).stop[0] if load_format(name).stop else tokenizer.eos_token
    end_id = tokenizer.token_id(end_text)
    before = " " if name == "vicuna_v1.1" else ""

    @_quick
    @given(_conversation)
    def check(conversation: Conversation) -> None:
        encoded = encode(conversation, name, kind, pending=False)
        assert len(encoded.ids) == len(encoded.mask)
        assert [span.reply for span in encoded.spans] == list(range(len(replies_of(conversation))))
        trained = {position for span in encoded.spans for position in range(span.start, span.end)}
        assert [int(position in trained) for position in range(len(encoded.ids))] == encoded.mask
        for span, index in zip(encoded.spans, replies_of(conversation), strict=True):
            assert encoded.ids[span.end - 1] == end_id
            written = tokenizer.decode(encoded.ids[span.start : span.end])
            assert written == before + (conversation.messages[index].content or "") + end_text

    check()


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_ids_decode_to_the_rendered_text(name: str, kind: str) -> None:
    tokenizer, chat_format = build_tokenizer(kind), load_format(name)

    @_quick
    @given(_conversation)
    def check(conversation: Conversation) -> None:
        rendering = chat_format.render(conversation, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
        begin = rendering.segments[0]
        control = None if begin.content else tokenizer.split_control(begin.text)[0]
        # Where the template writes no BOS, a tokenizer that does puts one; its mark before a first word is a space.
        bos = "<s>" if tokenizer.adds_bos and control != tokenizer.bos_id else ""
        mark = " " if tokenizer.adds_bos and not isinstance(control, int) else ""
        assert tokenizer.decode(encode(conversation, name, kind).ids) == bos + mark + rendering.text

    check()


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_control_text_in_a_message_is_never_a_control_token(name: str, kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    control = {tokenizer.token_id(text) for text in CONTROL}

    @_quick
    @given(_conversation)
    def check(conversation: Conversation) -> None:
        harmless = msgspec.structs.replace(
            conversation,
            messages=tuple(Message(message.role, "x") for message in conversation.messages),
            system="x" if conversation.system else conversation.system,
        )
        found = [token for token in encode(conversation, name, kind).ids if token in control]
        assert found == [token for token in encode(harmless, name, kind).ids if token in control]

    check()


@pytest.mark.parametrize("text", CONTROL)
@pytest.mark.parametrize("kind", KINDS)
def test_control_text_stays_readable_text(kind: str, text: str) -> None:
    tokenizer = build_tokenizer(kind)
    (ids,) = tokenizer.encode_texts([text], first=[False])
    assert len(ids) > 1
    assert tokenizer.token_id(text) not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.split_control(f"a{text}b") == ["a", tokenizer.token_id(text), "b"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_one_by_one_gives(kind: str) -> None:
    conversations = [
        Conversation(messages=(Message("user", "Hi"), Message("assistant", answer)), system=system)
        for answer in ("", "yes\n\n", " no")
        for system in (None, "", "Be brief.")
    ]
    chat_format, tokenizer = load_format("chatml"), build_tokenizer(kind)
    together = encode_conversations(conversations, chat_format, tokenizer)
    assert together == [encode_conversation(one, chat_format, tokenizer) for one in conversations]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(_plain, _tricky), min_size=1, max_size=6))
@example(["\n"])
@example(["\n\n", "\n"])
@example([" "])
def test_continued_pieces_join_without_a_space_of_their_own(texts: list[str]) -> None:
    for kind in KINDS:
        tokenizer = build_tokenizer(kind)
        joined = [token for ids in tokenizer.encode_texts(texts, first=[False] * len(texts)) for token in ids]
        assert tokenizer.decode(joined) == "".join(texts)
