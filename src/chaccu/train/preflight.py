"""What can be known of the data before the first step: that it is there, that replies can learn to end, and that the model has
every token.

It is free of torch. It ignores single conversations: `pack` refuses one that has no trained token. Rows of control tokens that
a run leaves untrained, `token_rows` refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from chaccu.artifact import storage_errors
from chaccu.conversation import ChatFormat, Conversation, Encoded, Message, TextTokenizer, encode_conversations
from chaccu.errors import TrainError
from chaccu.train.pack import TokenSequence
from chaccu.train.recipe import Recipe

_SHOWN = 8


def check_data(recipe: Recipe) -> None:
    """Raise `StorageError` for a file of the recipe's data, trained on or held out, that cannot be read."""
    for source in (*recipe.data, *recipe.validation):
        path = Path(source.path)
        with storage_errors(path), path.open("rb"):
            pass


def find_stop_id(chat_format: ChatFormat, tokenizer: TextTokenizer) -> int | None:
    """The control token with which the format ends a reply; None where it ends in plain text, or in the next turn's header."""
    probe = Conversation(messages=(Message("user", "?"), Message("assistant", "!")))
    (encoded,) = encode_conversations([probe], chat_format, tokenizer, pending=False)
    span = encoded.spans[-1]
    control = tokenizer.control_ids
    return next((token for token in reversed(encoded.ids[span.start : span.end]) if token in control), None)


def check_stop_trained(encoded: Sequence[Encoded | TokenSequence], chat_format: ChatFormat, tokenizer: TextTokenizer) -> None:
    """Raise `TrainError` when the token that ends a reply is trained in none of the conversations: the model would not stop."""
    stop = find_stop_id(chat_format, tokenizer)
    if stop is None or any(row.mask[place] for row in encoded for place in _places(row.ids, stop)):
        return
    read = sum(1 for row in encoded for _ in _places(row.ids, stop))
    raise TrainError(
        f"format {chat_format.name!r} ends a reply with {tokenizer.token_text(stop)!r} (token {stop}), which is trained in "
        f"none of {len(encoded):,} conversations and read {read:,} times: the model would never learn to stop.",
        remedy="train on conversations with whole replies, not only windows that end inside one; "
        "chaccu data show DATASET --format F --tokenizer DIR shows what is trained",
    )


def check_vocabulary(encoded: Sequence[Encoded | TokenSequence], tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Raise `TrainError` when a conversation has a token whose id the model has no row for.

    A tokenizer with more ids than the model is no fault by itself: some have tokens that the model is never given.
    """
    if max(max(row.ids) for row in encoded) < vocab_size:
        return
    beyond = sorted({token for row in encoded for token in row.ids if token >= vocab_size})
    hit = sum(1 for row in encoded if max(row.ids) >= vocab_size)
    named = ", ".join(f"{tokenizer.token_text(token)!r} ({token})" for token in beyond[:_SHOWN])
    more = f" and {len(beyond) - _SHOWN:,} more" if len(beyond) > _SHOWN else ""
    raise TrainError(
        f"the model has {vocab_size:,} tokens and its folder's tokenizer {tokenizer.vocab_size:,}; {hit:,} of {len(encoded):,} "
        f"conversations have {named}{more}.",
        remedy="put the tokenizer that the model was trained with in its folder; or choose a format without these tokens; or "
        "give the model rows for them: resize_token_embeddings of transformers",
    )


def _places(ids: Sequence[int], token: int) -> Iterator[int]:
    """Where `token` is predicted: not at a conversation's first place."""
    place = 0
    while True:
        try:
            place = ids.index(token, place + 1)
        except ValueError:
            return
        yield place
