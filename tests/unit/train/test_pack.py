"""Packing: conversations stay whole, and what cannot be trained on is named."""

from __future__ import annotations

import random

from chaccu.conversation import Encoded, load_format
from chaccu.train.pack import pack_rows

CHATML = load_format("chatml")


def encoded_of(length: int, start: int = 0) -> Encoded:
    return Encoded(list(range(start, start + length)), [0, *[1] * (length - 1)], ())


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
