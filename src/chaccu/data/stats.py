"""What a set of conversations is like: sizes, rounds and languages, as sums that can be added up record by record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from chaccu.conversation import Conversation
from chaccu.data.language import detect_language
from chaccu.data.records import read_conversations

TURN_BUCKETS = (2, 4, 6, 8, 10, 16, 24, 32, 64)
TOKEN_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHAR_BUCKETS = (250, 500, 1000, 2000, 4000, 8000, 16000, 32000)


class Summary(msgspec.Struct, frozen=True):
    """One conversation: its turns, the characters of its questions (tool turns among them) and answers, its main language, and
    its tokens where they were counted."""

    turns: int
    question_chars: int
    answer_chars: int
    language: str
    tokens: int | None = None


def summarise(conversation: Conversation, tokens: int | None = None) -> Summary:
    """The summary of one conversation."""
    answers = sum(len(message.content or "") for message in conversation.messages if message.role == "assistant")
    questions = sum(len(message.content or "") for message in conversation.messages if message.role != "assistant")
    return Summary(len(conversation.messages), questions, answers, detect_language(conversation), tokens)


class Stats(msgspec.Struct):
    """Sums over conversations. The histograms' keys read "up to N"; what is larger is under "more"."""

    conversations: int = 0
    turns: int = 0
    question_chars: int = 0
    answer_chars: int = 0
    tokens: int = 0
    turns_histogram: dict[str, int] = {}
    chars_histogram: dict[str, int] = {}
    tokens_histogram: dict[str, int] = {}
    languages: dict[str, int] = {}

    def add(self, summary: Summary) -> None:
        """Count one conversation."""
        self.conversations += 1
        self.turns += summary.turns
        self.question_chars += summary.question_chars
        self.answer_chars += summary.answer_chars
        _count(self.turns_histogram, _bucket(summary.turns, TURN_BUCKETS))
        _count(self.chars_histogram, _bucket(summary.question_chars + summary.answer_chars, CHAR_BUCKETS))
        if summary.tokens is not None:
            self.tokens += summary.tokens
            _count(self.tokens_histogram, _bucket(summary.tokens, TOKEN_BUCKETS))
        _count(self.languages, summary.language)

    def ordered(self) -> Stats:
        """The same with histograms in the order of their buckets and languages by count."""
        return msgspec.structs.replace(
            self,
            turns_histogram=_in_order(self.turns_histogram, TURN_BUCKETS),
            chars_histogram=_in_order(self.chars_histogram, CHAR_BUCKETS),
            tokens_histogram=_in_order(self.tokens_histogram, TOKEN_BUCKETS),
            languages=dict(sorted(self.languages.items(), key=lambda item: (-item[1], item[0]))),
        )


def measure_conversations(conversations: Iterable[Conversation]) -> Stats:
    """Stats of conversations read one by one."""
    stats = Stats()
    for conversation in conversations:
        stats.add(summarise(conversation))
    return stats.ordered()


def measure_path(path: Path) -> dict[str, Stats]:
    """Stats by file name: of one JSONL file, or of every one in a dataset's folder."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return {file.name: measure_conversations(read_conversations(file)) for file in files}


def _bucket(value: int, edges: tuple[int, ...]) -> str:
    return next((str(edge) for edge in edges if value <= edge), "more")


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _in_order(counts: dict[str, int], edges: tuple[int, ...]) -> dict[str, int]:
    return {key: counts[key] for key in (*map(str, edges), "more") if key in counts}
