"""Conversations → packed rows: several whole conversations to a row, never one that sees another.

Packing is first-fit decreasing (Johnson 1973), which wastes at most 11/9 of the best; here rows end more than 99 % full when
conversations are short beside the row. This module is free of torch; the model turns a row into tensors.

Invariants: a conversation is never cut; one that is longer than a row, or has no trained token, stops the run with its id.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from chaccu.artifact import storage_errors
from chaccu.conversation import ChatFormat, Conversation, Encoded, TextTokenizer, encode_conversations, parse_conversation
from chaccu.errors import TrainError
from chaccu.train.recipe import DataSource


class PackedRow(msgspec.Struct, frozen=True):
    """Whole conversations laid end to end; T tokens in all.

    `ids_T`, `mask_T` (1 = trained), `positions_T` (from 0 in each conversation); `lengths` of the conversations, summing to T.
    """

    ids_T: list[int]
    mask_T: list[int]
    positions_T: list[int]
    lengths: list[int]

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts: a conversation's first token is never predicted."""
        start, count = 0, 0
        for length in self.lengths:
            count += sum(self.mask_T[start + 1 : start + length])
            start += length
        return count


def read_source(source: DataSource) -> Iterator[Conversation]:
    """Conversations of a JSON-lines file. Raises `StorageError` or, with the line's number, `TrainError`."""
    path = Path(source.path)
    with storage_errors(path), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield parse_conversation(line)
                except Exception as error:
                    raise TrainError(f"{path}, line {number}: {error}") from error


def encode_sources(
    sources: Sequence[DataSource], chat_format: ChatFormat, tokenizer: TextTokenizer, *, sequence_len: int, seed: int
) -> list[Encoded]:
    """Encoded conversations of all sources, each source sampled and repeated as it says.

    Raises `TrainError` when a source has nothing usable, a conversation does not fit a row, or one has no trained token.
    """
    rows: list[Encoded] = []
    for source in sources:
        conversations = list(read_source(source))
        if not conversations:
            raise TrainError(f"{source.path} holds no conversations.", remedy="check the file, or run chaccu data clean again")
        random.Random(seed).shuffle(conversations)
        chosen: list[Encoded] = []
        limit = source.max_tokens or sequence_len
        wanted = source.conversations or len(conversations)
        for start in range(0, len(conversations), 64):
            batch = conversations[start : start + 64]
            for conversation, encoded in zip(batch, encode_conversations(batch, chat_format, tokenizer), strict=True):
                _check_row(conversation, encoded, source, sequence_len)
                if len(encoded.ids) <= limit and len(chosen) < wanted:
                    chosen.append(encoded)
            if len(chosen) >= wanted:
                break
        if not chosen:
            raise TrainError(f"no conversation of {source.path} has at most {limit} tokens.", remedy="raise max_tokens")
        rows.extend(chosen * source.repeat)
    return rows


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


def pack_rows(encoded: Sequence[Encoded], sequence_len: int, *, seed: int) -> list[PackedRow]:
    """First-fit decreasing into rows of at most `sequence_len` tokens, then shuffled by `seed`."""
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index].ids), index))
    rows: list[list[int]] = []
    left: list[int] = []
    for index in order:
        length = len(encoded[index].ids)
        place = next((row for row, room in enumerate(left) if room >= length), None)
        if place is None:
            rows.append([])
            left.append(sequence_len)
            place = len(rows) - 1
        rows[place].append(index)
        left[place] -= length
    packed = [_join_row([encoded[index] for index in row]) for row in rows]
    random.Random(seed).shuffle(packed)
    return packed


def _join_row(conversations: Sequence[Encoded]) -> PackedRow:
    return PackedRow(
        ids_T=[token for one in conversations for token in one.ids],
        mask_T=[bit for one in conversations for bit in one.mask],
        positions_T=[position for one in conversations for position in range(len(one.ids))],
        lengths=[len(one.ids) for one in conversations],
    )
