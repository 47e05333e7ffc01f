"""`encode_conversation`: token ids and loss mask, born together.

Invariant (token identity): for every assistant turn, the ids before its reply are exactly the ids of the conversation in
which that reply is awaited. It holds by construction: text is cut where generation begins and ends and at control tokens, each
cut piece is tokenised on its own, and an awaited reply cuts the list at such a place. The same holds where the trained part of
a windowed reply begins: the ids before it are those of the reply that is unfinished there. The mask follows the pieces, so it
cannot drift from the ids. The end-of-turn text inside a reply's generation span is trained with it. A token that the format
writes is never read out of a message, whether the tokenizer calls it special or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec

from chaccu.conversation.format import ChatFormat, Rendering
from chaccu.conversation.message import Conversation, Message
from chaccu.conversation.tokenizer import TextTokenizer
from chaccu.conversation.word_pieces import ID_BYTES, pack_ids, unpack_ids


class TokenSpan(msgspec.Struct, frozen=True):
    """Tokens `[start, end)` that generate assistant reply number `reply` (from 0); the mask says which of them are trained."""

    reply: int
    start: int
    end: int


class Encoded(msgspec.Struct, frozen=True):
    """`ids` of length T; `mask` of length T, 1 where the token is trained; one span a reply, in order."""

    ids: list[int]
    mask: list[int]
    spans: tuple[TokenSpan, ...]


class Measured(msgspec.Struct, frozen=True):
    """What `Encoded` would hold: `tokens` T, and one span a reply."""

    tokens: int
    spans: tuple[TokenSpan, ...]


class _Piece(msgspec.Struct):
    text: str
    token_id: int | None
    reply: int | None
    trained: bool
    packed: bytes = b""
    size: int = 0


def encode_conversation(
    conversation: Conversation, chat_format: ChatFormat, tokenizer: TextTokenizer, *, pending: bool | None = None
) -> Encoded:
    """Encode one conversation; see `encode_conversations`."""
    return encode_conversations([conversation], chat_format, tokenizer, pending=pending)[0]


def encode_conversations(
    conversations: Iterable[Conversation], chat_format: ChatFormat, tokenizer: TextTokenizer, *, pending: bool | None = None
) -> list[Encoded]:
    """Ids, mask and spans of each conversation, tokenised in one batch.

    `pending` as in `ChatFormat.render`: an awaited reply ends the ids where it would begin. Raises `FormatError` when the
    format refuses a conversation.
    """
    tokenizer, rows = _encode_pieces(conversations, chat_format, tokenizer, pending)
    return [_join_lists(row, tokenizer) for row in rows]


def pack_conversations(
    conversations: Iterable[Conversation], chat_format: ChatFormat, tokenizer: TextTokenizer
) -> list[tuple[bytes, bytes]]:
    """As `encode_conversations`, for much text: each conversation's ids as 32-bit integers in the machine's order and its mask
    as bytes, and no spans."""
    tokenizer, rows = _encode_pieces(conversations, chat_format, tokenizer, None)
    return [_join_pieces(row, tokenizer) for row in rows]


def _encode_pieces(
    conversations: Iterable[Conversation], chat_format: ChatFormat, tokenizer: TextTokenizer, pending: bool | None
) -> tuple[TextTokenizer, list[list[_Piece]]]:
    """The tokenizer that was used, and each conversation's pieces with their ids."""
    tokenizer, rows, plain = _cut_conversations(conversations, chat_format, tokenizer, pending)
    encoded = tokenizer.pack_texts([piece.text for piece, _ in plain], first=[first for _, first in plain])
    for (piece, _), packed in zip(plain, encoded, strict=True):
        piece.packed = packed
        piece.size = len(packed) // ID_BYTES
    return tokenizer, rows


def measure_conversations(
    conversations: Iterable[Conversation], chat_format: ChatFormat, tokenizer: TextTokenizer, *, pending: bool | None = None
) -> list[Measured]:
    """As `encode_conversations`, without the ids: how many there are, and where the replies stand among them."""
    tokenizer, rows, plain = _cut_conversations(conversations, chat_format, tokenizer, pending)
    sizes = tokenizer.count_texts([piece.text for piece, _ in plain], first=[first for _, first in plain])
    for (piece, _), size in zip(plain, sizes, strict=True):
        piece.size = size
    return [Measured(*_find_spans(row, len(_beginning(row, tokenizer)))) for row in rows]


def _cut_conversations(
    conversations: Iterable[Conversation], chat_format: ChatFormat, tokenizer: TextTokenizer, pending: bool | None
) -> tuple[TextTokenizer, list[list[_Piece]], list[tuple[_Piece, bool]]]:
    """The tokenizer to use, each conversation's pieces, and those of all that are to be tokenised, with whether each is a
    conversation's first."""
    tokenizer = guard_tokenizer(tokenizer, chat_format)
    bos, eos = tokenizer.bos_token or None, tokenizer.eos_token or None
    rows = [
        _cut_pieces(chat_format.render(conversation, pending=pending, bos_token=bos, eos_token=eos), tokenizer)
        for conversation in conversations
    ]
    written = [[piece for piece in row if piece.text or piece.token_id is not None] for row in rows]
    plain = [(piece, index == 0) for row in written for index, piece in enumerate(row) if piece.token_id is None]
    return tokenizer, rows, plain


@lru_cache(maxsize=16)
def guard_tokenizer(tokenizer: TextTokenizer, chat_format: ChatFormat) -> TextTokenizer:
    """`tokenizer` such that no text yields a token that the format writes: that its template spells out, or puts together when
    it writes a question and its answer. Raises `FormatError` as `ChatFormat.render` does."""
    probe = Conversation(messages=(Message("user", "?"), Message("assistant", "!")))
    rendering = chat_format.render(probe, bos_token=tokenizer.bos_token or None, eos_token=tokenizer.eos_token or None)
    written = "".join(segment.text if not segment.content else "\n" for segment in rendering.segments)
    known = "\n".join((chat_format.template, chat_format.default_system, *chat_format.stop, written))
    return tokenizer.guarding(frozenset(token for token in tokenizer.control_tokens if token in known))


def _cut_pieces(rendering: Rendering, tokenizer: TextTokenizer) -> list[_Piece]:
    """Join runs of text that are generated or read alike; end a run at every control token that the template wrote."""
    pieces: list[_Piece] = []
    open_run = False
    for segment in rendering.segments:
        whole = segment.content or not segment.text
        trained = segment.reply is not None and segment.trained
        parts: Sequence[str | int] = [segment.text] if whole else tokenizer.split_control(segment.text)
        for part in parts:
            if isinstance(part, int):
                pieces.append(_Piece("", part, segment.reply, trained, pack_ids([part]), 1))
                open_run = False
            elif open_run and pieces[-1].reply == segment.reply and pieces[-1].trained == trained:
                pieces[-1].text += part
            else:
                pieces.append(_Piece(part, None, segment.reply, trained))
                open_run = True
    return pieces


def _beginning(pieces: list[_Piece], tokenizer: TextTokenizer) -> list[int]:
    """The BOS token that the tokenizer puts first, unless the format has written it."""
    bos_id = tokenizer.bos_id
    if not tokenizer.adds_bos or bos_id is None or (pieces and pieces[0].token_id == bos_id):
        return []
    return [bos_id]


def _join_pieces(pieces: list[_Piece], tokenizer: TextTokenizer) -> tuple[bytes, bytes]:
    begin = _beginning(pieces, tokenizer)
    ids = b"".join([pack_ids(begin), *(piece.packed for piece in pieces)])
    mask = b"".join([bytes(len(begin)), *((b"\1" if piece.trained else b"\0") * piece.size for piece in pieces)])
    return ids, mask


def _join_lists(pieces: list[_Piece], tokenizer: TextTokenizer) -> Encoded:
    ids, mask = _join_pieces(pieces, tokenizer)
    _, spans = _find_spans(pieces, len(_beginning(pieces, tokenizer)))
    return Encoded(unpack_ids(ids), list(mask), spans)


def _find_spans(pieces: list[_Piece], begin: int) -> tuple[int, tuple[TokenSpan, ...]]:
    """Tokens up to the end of the pieces, of which `begin` stand before them, and where each reply stands."""
    spans: list[TokenSpan] = []
    for piece in pieces:
        end = begin + piece.size
        if piece.reply is not None:
            if spans and spans[-1].reply == piece.reply:
                spans[-1] = TokenSpan(piece.reply, spans[-1].start, end)
            else:
                spans.append(TokenSpan(piece.reply, begin, end))
        begin = end
    return begin, tuple(spans)
