"""Packing: conversations stay whole, and what cannot be trained on is named."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from chaccu.conversation import Conversation, Encoded, Message, load_format
from chaccu.errors import StorageError, TrainError
from chaccu.testing.tiny import build_tokenizer
from chaccu.train.pack import encode_sources, pack_rows, read_source
from chaccu.train.recipe import DataSource

CHATML = load_format("chatml")


def encoded_of(length: int, start: int = 0) -> Encoded:
    return Encoded(list(range(start, start + length)), [0, *[1] * (length - 1)], ())


def write_conversations(path: Path, *conversations: Conversation) -> DataSource:
    path.write_bytes(b"\n".join(msgspec.json.encode(one) for one in conversations) + b"\n")
    return DataSource(path=str(path))


def talk(identity: str, reply: str | None = "The sky is blue.") -> Conversation:
    messages = [Message("user", "What colour is the sky?")]
    if reply is not None:
        messages.append(Message("assistant", reply))
    return Conversation(messages=tuple(messages), id=identity)


def test_no_conversation_is_cut_or_lost_and_rows_end_full() -> None:
    draw = random.Random(3)
    encoded = [encoded_of(draw.randint(4, 120), start=1000 * index) for index in range(400)]
    rows = pack_rows(encoded, 512, seed=0)
    found = []
    for row in rows:
        assert sum(row.lengths) == len(row.ids_T) == len(row.mask_T) == len(row.positions_T) <= 512
        start = 0
        for length in row.lengths:
            end = start + length
            found.append(list(row.ids_T[start:end]))
            assert row.positions_T[start:end] == list(range(length))
            assert list(row.mask_T[start:end]) == [0, *[1] * (length - 1)]
            start = end
    assert sorted(found) == sorted(one.ids for one in encoded)
    total = sum(len(one.ids) for one in encoded)
    assert total / (512 * len(rows)) > 0.97
    assert sum(row.trained_tokens for row in rows) == total - len(encoded)


def test_the_seed_alone_decides_the_order() -> None:
    encoded = [encoded_of(100, start=1000 * index) for index in range(40)]
    first = pack_rows(encoded, 128, seed=1)
    assert pack_rows(encoded, 128, seed=1) == first
    assert pack_rows(encoded, 128, seed=2) != first


def test_a_first_token_in_the_mask_is_not_counted_as_trained() -> None:
    (row,) = pack_rows([Encoded([5, 6], [1, 1], ()), Encoded([7, 8, 9], [1, 0, 1], ())], 8, seed=0)
    assert row.trained_tokens == 2


def test_too_long_names_the_conversation_and_both_numbers(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    source = write_conversations(tmp_path / "long.jsonl", talk("c-17", "The sky is blue. " * 30))
    (whole,) = encode_sources([source], CHATML, tokenizer, sequence_len=4096, seed=0)
    with pytest.raises(TrainError) as caught:
        encode_sources([source], CHATML, tokenizer, sequence_len=64, seed=0)
    for part in ("'c-17'", str(len(whole.ids)), "64", "long.jsonl"):
        assert part in caught.value.message


def test_max_tokens_leaves_long_ones_out(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    source = write_conversations(tmp_path / "mixed.jsonl", talk("long", "blue " * 200), talk("short"))
    limited = msgspec.structs.replace(source, max_tokens=64)
    (kept,) = encode_sources([limited], CHATML, tokenizer, sequence_len=64, seed=0)
    assert "The sky is blue." in tokenizer.decode(kept.ids)
    with pytest.raises(TrainError, match="at most 3 tokens"):
        encode_sources([msgspec.structs.replace(source, max_tokens=3)], CHATML, tokenizer, sequence_len=64, seed=0)


def test_max_tokens_above_the_row_still_keeps_rows_whole(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    source = msgspec.structs.replace(write_conversations(tmp_path / "a.jsonl", talk("a", "blue " * 200)), max_tokens=4096)
    with pytest.raises(TrainError, match="64"):
        encode_sources([source], CHATML, tokenizer, sequence_len=64, seed=0)


def test_no_trained_token_names_the_conversation(tmp_path: Path) -> None:
    source = write_conversations(tmp_path / "silent.jsonl", talk("mute", reply=None))
    with pytest.raises(TrainError, match=r"'mute'.*no trained token"):
        encode_sources([source], CHATML, build_tokenizer(tmp_path), sequence_len=512, seed=0)


def test_sampling_and_repeating(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    source = write_conversations(tmp_path / "many.jsonl", *(talk(str(number), f"It is {number}.") for number in range(100)))
    source = msgspec.structs.replace(source, conversations=70, repeat=2)
    encoded = encode_sources([source], CHATML, tokenizer, sequence_len=512, seed=5)
    assert len(encoded) == 140
    assert len({tuple(one.ids) for one in encoded}) == 70
    assert encode_sources([source], CHATML, tokenizer, sequence_len=512, seed=5) == encoded
    assert encode_sources([source], CHATML, tokenizer, sequence_len=512, seed=6) != encoded


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.jsonl"):
        list(read_source(DataSource(path=str(tmp_path / "absent.jsonl"))))
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(msgspec.json.encode(talk("a")) + b"\n\n{oops\n")
    with pytest.raises(TrainError, match=r"broken\.jsonl, line 3"):
        list(read_source(DataSource(path=str(broken))))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(TrainError, match="no conversations"):
        encode_sources([DataSource(path=str(empty))], CHATML, build_tokenizer(tmp_path), sequence_len=512, seed=0)
