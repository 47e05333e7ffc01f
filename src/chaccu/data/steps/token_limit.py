"""Token limit: a conversation that is too long becomes several, cut between rounds, so that no round is lost or shortened.

Tokens are counted as the chat format writes them: beginning (BOS, system text) once a part, then its rounds. A round that
alone is over the limit becomes windows of its answer, each behind the question. A question that leaves no room for its answer
is shortened in the middle, where a pasted text is, or its round is left out; each is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from chaccu.conversation import ChatFormat, Conversation, Message, TextTokenizer, measure_conversations, resolve_format
from chaccu.data.answer_windows import cut_answer, omit_middle
from chaccu.data.outcome import Changed, Drop, Outcome, Step
from chaccu.data.rounds import Round, join_rounds, split_rounds
from chaccu.errors import FormatError

# Of the limit: what a question must leave to its answer, and what an answer may claim of the place of its question.
_LEAST_ROOM, _CLAIMED_ROOM = 1 / 8, 1 / 2
_SPLIT = "split at the token limit"
_WINDOWS = "answer in windows of the token limit"
_SHORTENED = "question over the token limit shortened"
_LEFT_OUT = "round over the token limit"


class TokenLimit(Step, frozen=True):
    """`tokenizer`: folder or file of a tokenizer.json; `max_tokens`: of a whole part; `chat_format`: which format writes it;
    `long_questions`: what is done with one that leaves no room for its answer."""

    name: ClassVar[str] = "token_limit"

    tokenizer: str
    max_tokens: Annotated[int, msgspec.Meta(ge=16)]
    chat_format: str = "chatml"
    long_questions: Literal["shorten", "leave_out"] = "shorten"

    def __call__(self, conversation: Conversation) -> Outcome:
        rounds = split_rounds(conversation.messages)
        head, costs = self._count_tokens(conversation, rounds)
        parts: list[list[Round]] = []
        sizes: list[int] = []
        reasons: set[str] = set()
        begin_anew = True
        for turns, cost in zip(rounds, costs, strict=True):
            if head + cost > self.max_tokens:
                reason, windows = self._cut_round(conversation, turns)
                reasons.add(reason)
                parts += [[window] for window, _ in windows]
                sizes += [size for _, size in windows]
                # What follows was said in sight of the whole round: it begins a part of its own.
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
        if len(parts) > 1:
            reasons.add(_SPLIT)
        if not reasons:
            return Changed((conversation,), (), tuple(sizes))
        named = [(f"/{number}" if len(parts) > 1 else "", part) for number, part in enumerate(parts, start=1)]
        conversations = tuple(join_rounds(conversation, part, id_suffix=suffix) for suffix, part in named)
        return Changed(conversations, tuple(sorted(reasons)), tuple(sizes))

    def _cut_round(self, conversation: Conversation, turns: Round) -> tuple[str, list[tuple[Round, int]]]:
        """What is done with a round over the limit, and the windows of its answer with the tokens of each as a part.

        There are none when the round is more than a question and its answer, the format rewrites answers, or they say so.
        """
        if [message.role for message in turns] != ["user", "assistant"]:
            return _LEFT_OUT, []
        question, answer = turns[0].content or "", turns[1].content or ""
        frame = self._measure(conversation, [(Message("user", ""), Message("assistant", ""))])[0]
        asked, answered = self._count([question, answer])
        free = self.max_tokens - frame
        room = free - asked
        shortens = room < min(answered, self.max_tokens * _LEAST_ROOM)
        if shortens and self.long_questions == "leave_out":
            return _LEFT_OUT, []
        if shortens:
            room = min(answered, int(free * _CLAIMED_ROOM))
        # Beside its neighbours a text may take a token more or less than by itself.
        spare = 0
        while spare < room:
            if shortens:
                question = omit_middle(turns[0].content or "", free - room - spare, self._count)
            answers = cut_answer(answer, room if shortens else room - spare, self._count)
            if not answers:
                break
            windows: list[Round] = [(Message("user", question), window) for window in answers]
            try:
                sizes = self._measure(conversation, windows)
            except FormatError:
                break
            excess = max(sizes, default=0) - self.max_tokens
            if excess <= 0:
                return (_SHORTENED if shortens else _WINDOWS, list(zip(windows, sizes, strict=True)))
            spare += excess
        return _LEFT_OUT, []

    def _count(self, texts: Sequence[str]) -> list[int]:
        return self.load_tokenizer().count_texts(texts, first=[False] * len(texts))

    def _measure(self, conversation: Conversation, rounds: list[Round]) -> list[int]:
        """Tokens of each round as a part of its own."""
        parts = [join_rounds(conversation, [turns]) for turns in rounds]
        return [measured.tokens for measured in measure_conversations(parts, self.load_format(), self.load_tokenizer())]

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
