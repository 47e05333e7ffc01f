"""Token limit: a conversation that is too long becomes several, cut only between rounds, so that no round is lost or
shortened.

Tokens are counted as the chat format writes them: beginning (BOS, system text) once a part, then its rounds. A round that
alone is over the limit cannot be kept whole and is left out by name.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

from chaccu.conversation import ChatFormat, Conversation, Message, TextTokenizer, measure_conversations, resolve_format
from chaccu.data.outcome import Changed, Drop, Outcome, Step
from chaccu.data.rounds import Round, join_rounds, split_rounds


class TokenLimit(Step, frozen=True):
    """`tokenizer`: folder or file of a tokenizer.json; `max_tokens`: of a whole part; `chat_format`: which format writes it."""

    name: ClassVar[str] = "token_limit"

    tokenizer: str
    max_tokens: Annotated[int, msgspec.Meta(ge=16)]
    chat_format: str = "chatml"

    def __call__(self, conversation: Conversation) -> Outcome:
        rounds = split_rounds(conversation.messages)
        head, costs = self._count_tokens(conversation, rounds)
        parts: list[list[Round]] = []
        sizes: list[int] = []
        lost = 0
        begin_anew = True
        for turns, cost in zip(rounds, costs, strict=True):
            if head + cost > self.max_tokens:
                lost += 1
                # What follows was said in sight of the lost round: it begins a part of its own.
                begin_anew = True
                continue
            if begin_anew or sizes[-1] + cost > self.max_tokens:
                parts.append([])
                sizes.append(head)
                begin_anew = False
            parts[-1].append(turns)
            sizes[-1] += cost
        if not parts:
            return Drop("every round is over the token limit")
        reasons = (("round over the token limit",) if lost else ()) + (("split at the token limit",) if len(parts) > 1 else ())
        if not reasons:
            return Changed((conversation,), (), tuple(sizes))
        named = [(f"/{number}" if len(parts) > 1 else "", part) for number, part in enumerate(parts, start=1)]
        conversations = tuple(join_rounds(conversation, part, id_suffix=suffix) for suffix, part in named)
        return Changed(conversations, reasons, tuple(sizes))

    def load_tokenizer(self) -> TextTokenizer:
        """The tokenizer, loaded once a process. Raises `TokenizerError` when it is missing or unreadable."""
        return _load_tokenizer(self.tokenizer)

    def load_format(self) -> ChatFormat:
        """The format in which tokens are counted. Raises `UsageError` for an unknown one."""
        return resolve_format(self.chat_format, Path(self.tokenizer))

    def _count_tokens(self, conversation: Conversation, rounds: list[Round]) -> tuple[int, list[int]]:
        """Tokens of a part's beginning and end, and of each round.

        Ids are joined from pieces that are cut where replies begin and end, so the tokens of a part are the sum of these.
        """
        before, after = _measure_frame(self.tokenizer, self.chat_format, conversation.system)
        ends = _measure_ends(self.tokenizer, self.chat_format, conversation, rounds)
        return before + after, [end - begin for begin, end in pairwise([before, *ends[:-1]])]


def _measure_ends(tokenizer: str, chat_format: str, conversation: Conversation, rounds: list[Round]) -> list[int]:
    """Tokens up to the end of each round's last reply, and of the whole."""
    found = resolve_format(chat_format, Path(tokenizer))
    measured = measure_conversations([conversation], found, _load_tokenizer(tokenizer))[0]
    last_span = {span.reply: span.end for span in measured.spans}
    replies = accumulate(sum(message.role == "assistant" for message in turns) for turns in rounds)
    return [*(last_span[reply - 1] for reply in replies), measured.tokens]


@lru_cache(maxsize=256)
def _measure_frame(tokenizer: str, chat_format: str, system: str | None) -> tuple[int, int]:
    """Tokens before a conversation's first round, and behind its last; told from the rounds by writing one twice."""
    turns = (Message("user", "?"), Message("assistant", "!"))
    twice = Conversation(messages=turns * 2, system=system)
    first, second, whole = _measure_ends(tokenizer, chat_format, twice, [turns, turns])
    return first - (second - first), whole - second


@lru_cache(maxsize=4)
def _load_tokenizer(path: str) -> TextTokenizer:
    return TextTokenizer.load(Path(path))
