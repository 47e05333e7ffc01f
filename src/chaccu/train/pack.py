"""Conversations → packed rows: several whole conversations to a row, never one that sees another.

Packing is best-fit decreasing (Johnson et al. 1974), which needs at most 11/9 of the fewest rows, as first-fit does; here
rows end more than 99 % full when conversations are short beside the row. This module is free of torch; the model turns a row
into tensors.

Invariants: a conversation is never cut; one that is longer than a row, or has no trained token, stops the run with its id. In
memory stand the tokens, five bytes each, not the texts.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path

import msgspec

from chaccu.artifact import storage_errors
from chaccu.conversation import ChatFormat, Conversation, Encoded, TextTokenizer, encode_conversations, parse_conversation
from chaccu.errors import TrainError
from chaccu.train.recipe import DataSource

_BATCH = 64


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


def read_source(source: DataSource, *, shuffle_seed: int | None = None) -> Iterator[Conversation]:
    """Conversations of a JSON-lines file, in the file's order or shuffled; only the lines' places are held in memory.

    Raises `StorageError` or, with the line's number, `TrainError`.
    """
    path = Path(source.path)
    with storage_errors(path), path.open("rb") as file:
        places, place = [], 0
        for number, line in enumerate(file, 1):
            if line.strip():
                places.append((number, place))
            place += len(line)
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(places)
        for number, place in places:
            file.seek(place)
            try:
                yield parse_conversation(file.readline())
            except Exception as error:
                raise TrainError(f"{path}, line {number}: {error}") from error


def encode_sources(
    sources: Sequence[DataSource], chat_format: ChatFormat, tokenizer: TextTokenizer, *, sequence_len: int, seed: int
) -> list[TokenSequence]:
    """Encoded conversations of all sources, each source sampled and repeated as it says.

    Raises `TrainError` when a source has nothing usable, a conversation does not fit a row, or one has no trained token.
    """
    rows: list[TokenSequence] = []
    for source in sources:
        limit = source.max_tokens or sequence_len
        chosen: list[TokenSequence] = []
        found = False
        for batch in _batches(read_source(source, shuffle_seed=seed)):
            found = True
            for conversation, encoded in zip(batch, encode_conversations(batch, chat_format, tokenizer), strict=True):
                _check_row(conversation, encoded, source, sequence_len)
                if len(encoded.ids) <= limit:
                    chosen.append(TokenSequence(array("i", encoded.ids), array("b", encoded.mask)))
            if source.conversations is not None and len(chosen) >= source.conversations:
                break
        if not found:
            raise TrainError(f"{source.path} holds no conversations.", remedy="check the file, or run chaccu data clean again")
        if not chosen:
            raise TrainError(f"no conversation of {source.path} has at most {limit} tokens.", remedy="raise max_tokens")
        rows.extend(chosen[: source.conversations] * source.repeat)
    return rows


def _batches(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    while batch := list(islice(conversations, _BATCH)):
        yield batch


def _check_row(conversation: Conversation, encoded: Encoded, source: DataSource, sequence_len: int) -> None:
    if not any(encoded.mask[1:]):
        raise TrainError(
            f"conversation {conversation.id!r} of {source.path} has no trained token.",
            remedy="leave out conversations without a reply: chaccu data clean does",
        )
    if sequence_len < len(encoded.ids) <= (source.max_tokens or len(encoded.ids)):
        raise TrainError(
            f"conversation {conversation.id!r} of {source.path} has {len(encoded.ids)} tokens; sequence_len is {sequence_len}.",
            remedy=f"chaccu data clean --max-tokens {sequence_len} splits it; sequence_len takes it; max_tokens leaves it out",
        )


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
