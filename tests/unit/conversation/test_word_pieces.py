"""Encoding by words gives exactly the ids of encoding whole texts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaccu.conversation import word_pieces
from chaccu.conversation.word_pieces import WordPieces, adjacent_characters, pack_ids, unpack_ids

from .small_tokenizers import ADDED, CONTROL, build_tokenizer

KINDS = ("sentencepiece", "gemma")
PARTS = st.sampled_from(
    [
        *CONTROL,
        *ADDED,
        " ",
        "  ",
        "\n",
        "\n\n",
        "▁",
        "vicuña",
        "user",
        "the",
        "answer",
        "is 42.",
        "é",
        "漢字",
        "🦙",
        "\t",
        ".",
        "_",
        "'s",
    ]
)
TEXTS = st.lists(st.one_of(PARTS, st.text(max_size=6)), max_size=12).map("".join)


def encode_whole(kind: str, texts: Sequence[str]) -> list[bytes]:
    backend = build_tokenizer(kind)._continuing
    return [pack_ids(backend.encode(text, add_special_tokens=False).ids) for text in texts]


def build_word_pieces(kind: str) -> WordPieces:
    tokenizer = build_tokenizer(kind)
    pairs = adjacent_characters(tokenizer._continuing)
    assert pairs is not None
    return WordPieces(lambda words: encode_whole(kind, words), pairs)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_ids_are_those_of_the_whole_text(kind: str, texts: list[str]) -> None:
    words = build_word_pieces(kind)
    assert all("".join(words.split(text)) == text for text in texts)
    assert words.encode_texts(texts) == encode_whole(kind, texts)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), first=st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_tokenizer_gives_the_same_ids_before_and_after_it_turns_to_words(
    kind: str, texts: list[str], first: list[bool]
) -> None:
    tokenizer = build_tokenizer(kind)
    tokenizer._chars = 0
    whole = tokenizer.encode_texts(texts, first=first[: len(texts)])
    tokenizer._chars = 1 << 40
    assert tokenizer.encode_texts(texts, first=first[: len(texts)]) == whole


def test_texts_are_cut_where_no_token_spans_and_nowhere_else() -> None:
    assert WordPieces(lambda words: [], {"ab", "▁a", "▁▁"}).split("ab  ab.ab\nab") == ["ab", "  ab", ".", "ab", "\n", "ab"]
    assert WordPieces(lambda words: [], {"b▁", "b.", "\na"}).split("ab  ab.ab\nab") == ["ab  ab.", "ab", "\nab"]
    assert WordPieces(lambda words: [], {".▁"}).split("a.  a") == ["a", ".  a"]


def test_the_cache_is_bounded_and_keeps_no_long_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_pieces, "_MAX_WORDS", 10)
    asked: list[str] = []

    def encode(words: Sequence[str]) -> list[bytes]:
        asked.extend(words)
        return [pack_ids([len(word)]) for word in words]

    words = WordPieces(encode, set())
    long = "x" * 100
    assert [unpack_ids(ids) for ids in words.encode_texts([f"a {long} a", long])] == [[1, 101, 2], [100]]
    assert asked == ["a", f" {long}", " a", long]
    for number in range(100):
        words.encode_texts([f"w{number}"])
    assert len(words._cache) <= 12


def test_other_kinds_of_tokenizer_are_left_alone() -> None:
    assert adjacent_characters(build_tokenizer("byte_level")._continuing) is None
