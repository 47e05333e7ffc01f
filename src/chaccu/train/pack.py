"""Conversations → packed rows: several whole conversations to a row, never one that sees another.

Packing is best-fit decreasing (Johnson et al. 1974), which needs at most 11/9 of the fewest rows, as first-fit does; here
rows end more than 99 % full when conversations are short beside the row. This module is free of torch; the model turns a row
into tensors.

Invariants: a conversation is never cut, and none is lost. In memory stand the tokens, five bytes each, not the texts.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from chaccu.conversation import Encoded


class TokenSequence(msgspec.Struct, frozen=True):
    """One encoded conversation of T tokens: `ids` (int32) and `mask` (int8, 1 = trained)."""

    ids: array[int]
    mask: array[int]


class PackedRow(msgspec.Struct, frozen=True):
    """Whole conversations laid end to end; T tokens in all: `ids_T`, `mask_T` (1 = trained), and the conversations' `lengths`,
    which sum to T. One that does not `count` makes up another process's share: it goes through the model for nothing."""

    ids_T: Sequence[int]
    mask_T: Sequence[int]
    lengths: list[int]
    counts: bool = True

    @property
    def positions_T(self) -> list[int]:
        """Each token's place in its own conversation, from 0."""
        return [position for length in self.lengths for position in range(length)]

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts: a conversation's first token is never predicted."""
        firsts = accumulate([0, *self.lengths[:-1]])
        return sum(self.mask_T) - sum(self.mask_T[first] for first in firsts)


def pack_rows(encoded: Sequence[Encoded | TokenSequence], sequence_len: int, *, seed: int) -> list[PackedRow]:
    """Best-fit decreasing into rows of at most `sequence_len` tokens, then shuffled by `seed`."""
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index].ids), index))
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where a row has r tokens left
    for index in order:
        length = len(encoded[index].ids)
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1
            place = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, place = sequence_len, len(rows)
            rows.append([])
        rows[place].append(index)
        rows_by_room.setdefault(room - length, []).append(place)
        rooms |= 1 << (room - length)
    packed = [_join_row([encoded[index] for index in row]) for row in rows]
    random.Random(seed).shuffle(packed)
    return packed


def pad_row(row: PackedRow, size: int, longest: int) -> PackedRow:
    """`row` filled up to `size` tokens by untrained conversations of token 0, none longer than `longest`.

    Raises `ValueError` when it is longer already.
    """
    room = size - len(row.ids_T)
    if room < 0:
        raise ValueError(f"a row of {len(row.ids_T)} tokens does not fit {size}")
    filler = [longest] * (room // longest) + ([room % longest] if room % longest else [])
    return PackedRow([*row.ids_T, *[0] * room], [*row.mask_T, *[0] * room], [*row.lengths, *filler], row.counts)


def _join_row(sequences: Sequence[Encoded | TokenSequence]) -> PackedRow:
    ids, mask = array("i"), array("b")
    for sequence in sequences:
        ids.extend(sequence.ids)
        mask.extend(sequence.mask)
    return PackedRow(ids, mask, [len(sequence.ids) for sequence in sequences])
