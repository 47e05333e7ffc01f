"""Whether a chat format keeps its promises with a tokenizer: `check_format` tries it out before anything is trained or served.

The promises: the ids before a reply are those of the conversation that awaits it (token identity); what is trained reads as the
reply with the end of its turn, and nothing else is; no text of a message yields a token that the format writes. The formats of
this package keep them with any byte-complete tokenizer; one that rewrites text does not, nor does a template that looks ahead.
"""

from __future__ import annotations

from collections import Counter

from chaccu.conversation.encode import Encoded, encode_conversation, guard_tokenizer
from chaccu.conversation.format import ChatFormat
from chaccu.conversation.message import Conversation, Message
from chaccu.conversation.tokenizer import TextTokenizer
from chaccu.errors import TokenizerError

_REMEDY = "use another format or another tokenizer with this one"


def check_format(chat_format: ChatFormat, tokenizer: TextTokenizer) -> None:
    """Try the format with the tokenizer on two rounds of plain text, and on text full of control tokens.

    Raises `TokenizerError` with the turn and the token at which a promise breaks, `FormatError` when the format refuses two
    rounds of question and answer.
    """
    plain = _two_rounds("Hello there.\nTell me 2 things:\n\n- one", "Well: it is so.\n\n    x = 1\n")
    encoded = check_token_identity(plain, chat_format, tokenizer)
    _check_trained_text(plain, encoded, chat_format, tokenizer)
    _check_control_text(encoded, chat_format, guard_tokenizer(tokenizer, chat_format))


def check_token_identity(conversation: Conversation, chat_format: ChatFormat, tokenizer: TextTokenizer) -> Encoded:
    """Encode `conversation`, and its beginning before each reply, and compare.

    Raises `TokenizerError` with the turn and the token at which they part.
    """
    encoded = encode_conversation(conversation, chat_format, tokenizer, pending=False)
    spans = {span.reply: span for span in encoded.spans}
    turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    for reply, turn in enumerate(turns):
        prompt = encode_conversation(conversation.pending_at(turn), chat_format, tokenizer).ids
        begin = spans[reply].start
        if encoded.ids[:begin] == prompt:
            continue
        pairs = zip(encoded.ids[:begin], prompt, strict=False)
        at = next((index for index, (one, other) in enumerate(pairs) if one != other), min(begin, len(prompt)))
        raise TokenizerError(
            f"format {chat_format.name!r} does not keep token identity with this tokenizer: the prompt of turn {turn} and the "
            f"whole conversation part at token {at}: {_spell(tokenizer, prompt, at)} and {_spell(tokenizer, encoded.ids, at)}.",
            remedy=_REMEDY,
        )
    return encoded


def _check_trained_text(
    conversation: Conversation, encoded: Encoded, chat_format: ChatFormat, tokenizer: TextTokenizer
) -> None:
    bos, eos = tokenizer.bos_token or None, tokenizer.eos_token or None
    segments = chat_format.render(conversation, pending=False, bos_token=bos, eos_token=eos).segments
    for span in encoded.spans:
        expected = "".join(segment.text for segment in segments if segment.reply == span.reply)
        # Decoded behind what stands before it: a decoder may take a blank from the beginning of a text.
        before = tokenizer.decode(encoded.ids[: span.start])
        read = tokenizer.decode(encoded.ids[: span.end])
        if read != before + expected:
            raise TokenizerError(
                f"this tokenizer does not read reply {span.reply} back as format {chat_format.name!r} writes it: {expected!r} "
                f"becomes {read[len(before) :]!r} (tokens {span.start} to {span.end}).",
                remedy=_REMEDY,
            )


def _check_control_text(encoded: Encoded, chat_format: ChatFormat, guarded: TextTokenizer) -> None:
    """`encoded`: two rounds of plain text. Every control token must come as often when messages spell control tokens."""
    control = guarded.special_ids
    text = " ".join(guarded.token_text(token) for token in sorted(control)[:64])
    spelled = encode_conversation(_two_rounds(text, text), chat_format, guarded)
    expected = Counter(token for token in encoded.ids if token in control)
    found = Counter(token for token in spelled.ids if token in control)
    if found != expected:
        token = next(iter((found - expected) or (expected - found)))
        spelling = guarded.token_text(token)
        at = spelled.ids.index(token) if token in spelled.ids else 0
        raise TokenizerError(
            f"this tokenizer reads the text {spelling!r} of a message as control token {token} (at token {at}).",
            remedy=_REMEDY,
        )


def _two_rounds(question: str, answer: str) -> Conversation:
    return Conversation(messages=(Message("user", question), Message("assistant", answer)) * 2)


def _spell(tokenizer: TextTokenizer, ids: list[int], at: int) -> str:
    return f"{ids[at]} ({tokenizer.token_text(ids[at])!r})" if at < len(ids) else "the end"
