"""Data sources → token sequences: what of each is read, in which order, and what cannot be trained on.

A chunk of lines is encoded in one go, here or in worker processes (`encode_workers`): the same function either way. This module
is free of torch.

Invariants: the result does not depend on how many processes made it; a conversation that is longer than a row, that the format
refuses or that has no trained token stops the run with its id. In memory stand the tokens, five bytes each, and a few chunks of
text.
"""

from __future__ import annotations

import contextlib
import random
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import msgspec

from chaccu.artifact import storage_errors
from chaccu.conversation import ChatFormat, Conversation, TextTokenizer, pack_conversations, parse_conversation
from chaccu.errors import ChaccuError, TrainError
from chaccu.train.encode_workers import choose_workers, encoding_in
from chaccu.train.pack import TokenSequence
from chaccu.train.recipe import DataSource

_CHUNK_LINES = 64

# A line's number in its file, from 1, and the line.
Line = tuple[int, bytes]
# Which source a chunk is of, its lines, and ids (int32) and mask (int8) of the conversations that were not left out.
Piece = tuple[int, int, list[tuple[bytes, bytes]]]
Relay = Callable[[Callable[[], Generator[Piece]]], Generator[Piece]]


class Chunk(msgspec.Struct, frozen=True):
    """Lines of one source."""

    source: DataSource
    lines: list[Line]


class Encoding(msgspec.Struct, frozen=True):
    """How lines become tokens. `sequence_len`: the most tokens that a conversation may have."""

    chat_format: ChatFormat
    tokenizer: TextTokenizer
    sequence_len: int

    def encode_chunk(self, chunk: Chunk) -> list[tuple[bytes, bytes]]:
        """Ids (int32) and mask (int8) of each conversation of the chunk that the source's `max_tokens` does not leave out.

        Raises `TrainError` with the conversation's id, or with the line's number where it is none.
        """
        conversations = [_parse(line, number, chunk.source) for number, line in chunk.lines]
        encoded = self._pack(conversations, chunk.source)
        for conversation, (_, mask) in zip(conversations, encoded, strict=True):
            self._check(conversation, chunk.source, len(mask), trained=1 in mask[1:])
        limit = chunk.source.max_tokens or self.sequence_len
        return [(ids, mask) for ids, mask in encoded if len(mask) <= limit]

    def _pack(self, conversations: list[Conversation], source: DataSource) -> list[tuple[bytes, bytes]]:
        try:
            return pack_conversations(conversations, self.chat_format, self.tokenizer)
        except ChaccuError:
            for conversation in conversations:
                try:
                    pack_conversations([conversation], self.chat_format, self.tokenizer)
                except ChaccuError as error:
                    message = f"conversation {conversation.id!r} of {source.path}: {error.message}"
                    raise TrainError(message, remedy=error.remedy) from error
            raise

    def _check(self, conversation: Conversation, source: DataSource, tokens: int, *, trained: bool) -> None:
        if not trained:
            raise TrainError(
                f"conversation {conversation.id!r} of {source.path} has no trained token.",
                remedy="leave out conversations without a reply: chaccu data clean does",
            )
        if self.sequence_len < tokens <= (source.max_tokens or tokens):
            raise TrainError(
                f"conversation {conversation.id!r} of {source.path} has {tokens} tokens; sequence_len is {self.sequence_len}.",
                remedy=f"chaccu data clean --max-tokens {self.sequence_len} splits it; sequence_len takes it; "
                "max_tokens leaves it out",
            )


class _SourceLines:
    """The lines of a source's file that are not blank, of which only the places are held in memory."""

    def __init__(self, source: DataSource, shuffle_seed: int | None) -> None:
        self._path = Path(source.path)
        self._places: list[tuple[int, int]] = []
        with storage_errors(self._path), self._path.open("rb") as file:
            place = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._places.append((number, place))
                place += len(line)
        self.bytes = place
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Line]:
        with storage_errors(self._path), self._path.open("rb") as file:
            for number, place in self._places:
                file.seek(place)
                yield number, file.readline()


def read_source(source: DataSource, *, shuffle_seed: int | None = None) -> Iterator[Conversation]:
    """Conversations of a JSON-lines file, in the file's order or shuffled.

    Raises `StorageError` or, with the line's number, `TrainError`.
    """
    for number, line in _SourceLines(source, shuffle_seed):
        yield _parse(line, number, source)


def encode_sources(
    sources: Sequence[DataSource],
    chat_format: ChatFormat,
    tokenizer: TextTokenizer,
    *,
    sequence_len: int,
    seed: int,
    workers: int | None = None,
    report: Callable[[int, int], None] | None = None,
    report_left_out: Callable[[str, int], None] | None = None,
    relay: Relay | None = None,
) -> list[TokenSequence]:
    """Encoded conversations of all sources, each source sampled and repeated as it says.

    `workers`: processes that encode; by default as many as the sources are worth, and 1 is this process itself. `report` is
    told how many conversations are done, and of how many; `report_left_out` how many of a source's path were read and left out,
    for they have more than its `max_tokens`. `relay`: gives what the function that it is handed yields, or what it
    yielded in another process of the run.

    Raises `TrainError` when a source has nothing usable, a conversation does not fit a row, or one has no trained token.
    """
    encoding = Encoding(chat_format, tokenizer, sequence_len)
    make = partial(_encode_all, sources, encoding, seed, workers, report or (lambda done, total: None))
    chosen: list[list[TokenSequence]] = [[] for _ in sources]
    left_out = [0] * len(sources)
    with contextlib.closing(relay(make) if relay is not None else make()) as pieces:
        for place, lines, piece in pieces:
            left_out[place] += lines - len(piece)
            chosen[place].extend(TokenSequence(array("i", ids), array("b", mask)) for ids, mask in piece)
    rows: list[TokenSequence] = []
    for source, found, count in zip(sources, chosen, left_out, strict=True):
        if count and report_left_out is not None:
            report_left_out(source.path, count)
        if not found:
            limit = source.max_tokens or sequence_len
            raise TrainError(f"no conversation of {source.path} has at most {limit} tokens.", remedy="raise max_tokens")
        rows.extend(found[: source.conversations] * source.repeat)
    return rows


def _encode_all(
    sources: Sequence[DataSource], encoding: Encoding, seed: int, workers: int | None, report: Callable[[int, int], None]
) -> Generator[Piece]:
    """The sources' conversations, chunk by chunk, until each has what it wants."""
    lines = [_SourceLines(source, seed) for source in sources]
    wanted = [min(len(read), source.conversations or len(read)) for source, read in zip(sources, lines, strict=True)]
    total = sum(wanted)
    if workers is None:
        workers = choose_workers(sum(read.bytes * want // max(1, len(read)) for read, want in zip(lines, wanted, strict=True)))
    report(0, total)
    with encoding_in(workers, encoding) as encode:
        for place, (source, read) in enumerate(zip(sources, lines, strict=True)):
            if not len(read):
                raise TrainError(
                    f"{source.path} holds no conversations.", remedy="check the file, or run chaccu data clean again"
                )
            before, seen, kept = sum(wanted[:place]), 0, 0
            with contextlib.closing(encode(_cut_chunks(source, read))) as encoded:
                for piece in encoded:
                    lines_read = min(_CHUNK_LINES, len(read) - seen)
                    yield place, lines_read, piece
                    seen, kept = seen + lines_read, kept + len(piece)
                    done = kept if source.conversations is not None else seen
                    report(before + min(done, wanted[place]), total)
                    if kept >= (source.conversations or len(read)):
                        break
            report(before + wanted[place], total)


def _cut_chunks(source: DataSource, lines: Iterable[Line]) -> Iterator[Chunk]:
    rest = iter(lines)
    while chunk := list(islice(rest, _CHUNK_LINES)):
        yield Chunk(source, chunk)


def _parse(line: bytes, number: int, source: DataSource) -> Conversation:
    try:
        return parse_conversation(line)
    except ChaccuError as error:
        raise TrainError(f"{source.path}, line {number}: {error}") from error
