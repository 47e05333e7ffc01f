"""Page debris: what the page that a conversation was copied from left in its texts.

Rounds go whose answer is the page's own message (a rate limit, a network error). Cut out, and nothing beside it: the counter
of a regenerated answer ("2 / 3") where it begins, the copy button's tail ("Copy123 chars / 45 words") and the policy notice
at the end, button labels on lines of their own in answers, a system text that only says where the conversation was shared.
What is looked for is in `page_debris.yaml`. A counter counts as one only when the first number is not above the second and
what follows could not be part of a sum.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import ClassVar

import msgspec

from chaccu.conversation import Conversation, Message
from chaccu.data.outcome import Changed, Drop, Outcome, Step
from chaccu.data.rounds import Round, join_rounds, split_rounds
from chaccu.data.steps.word_lists import describe_lists, read_lists

_COUNTER_NUMBERS = re.compile(r"(\d+) / (\d+)")
_COUNTER = "page counter cut"
_TAIL = "page tail cut"
_LABEL = "button label cut"
_NOTICE = "answer is a page notice"
_SYSTEM = "share note in the system text cut"
# Longer texts are no notices.
_NOTICE_CHARS = 400


class _Debris(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A list file: regular expressions by place."""

    notices: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    later_counters: tuple[str, ...] = ()
    tails: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    system: tuple[str, ...] = ()


class _Patterns(msgspec.Struct, frozen=True):
    notice: re.Pattern[str]
    counter: re.Pattern[str]
    later_counter: re.Pattern[str]
    tail: re.Pattern[str]
    label: re.Pattern[str]
    system: re.Pattern[str]


class PageDebris(Step, frozen=True):
    """`questions`: whether counters and tails are cut from questions too, to the character; else questions stay as they are.
    `lists`: the shipped list, and files of the same form."""

    name: ClassVar[str] = "page_debris"

    questions: bool = True
    lists: tuple[str, ...] = ("page_debris",)

    def __post_init__(self) -> None:
        _compile(self.lists)

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "lists": describe_lists(self.lists)}

    def __call__(self, conversation: Conversation) -> Outcome:
        patterns = _compile(self.lists)
        reasons: list[str] = []
        if conversation.system is not None and patterns.system.fullmatch(conversation.system.strip()):
            conversation = msgspec.structs.replace(conversation, system=None)
            reasons.append(_SYSTEM)
        rounds: list[Round] = []
        for turns in split_rounds(conversation.messages):
            if any(message.role == "assistant" and _is_notice(patterns, message.content or "") for message in turns):
                reasons.append(_NOTICE)
                continue
            rounds.append(tuple(self._repair(patterns, message, reasons) for message in turns))
        if not reasons:
            return conversation
        return Changed((join_rounds(conversation, rounds),), tuple(reasons)) if rounds else Drop(reasons[-1])

    def _repair(self, patterns: _Patterns, message: Message, reasons: list[str]) -> Message:
        text = message.content or ""
        if message.role == "tool" or (message.role == "user" and not self.questions):
            return message
        repaired = _cut_tail(patterns, text, reasons)
        repaired = _cut_counter(patterns, repaired, reasons)
        if message.role == "assistant" and "opy code" in repaired:
            repaired = _cut_labels(patterns, repaired, reasons)
        return message if repaired == text else Message(message.role, repaired)


def _is_notice(patterns: _Patterns, text: str) -> bool:
    if len(text) > _NOTICE_CHARS:
        return False
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    return all(patterns.notice.fullmatch(paragraph) for paragraph in paragraphs)


def _cut_tail(patterns: _Patterns, text: str, reasons: list[str]) -> str:
    found = patterns.tail.search(text, max(0, len(text) - _NOTICE_CHARS))
    if found is None:
        return text
    reasons.append(_TAIL)
    return text[: found.start()]


def _cut_counter(patterns: _Patterns, text: str, reasons: list[str]) -> str:
    found = patterns.counter.match(text)
    if found is None and " / " in text:
        found = patterns.later_counter.search(text)
    numbers = _COUNTER_NUMBERS.search(found[0]) if found is not None else None
    if found is None or numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]) or int(numbers[2]) < 2:
        return text
    reasons.append(_COUNTER)
    return text[: found.start()] + text[found.end() :].removeprefix("\n")


def _cut_labels(patterns: _Patterns, text: str, reasons: list[str]) -> str:
    lines = text.split("\n")
    kept = [line if (found := patterns.label.fullmatch(line)) is None else (found[1] or None) for line in lines]
    if kept == lines:
        return text
    reasons.append(_LABEL)
    return "\n".join(line for line in kept if line is not None)


@lru_cache(maxsize=16)
def _compile(lists: tuple[str, ...]) -> _Patterns:
    debris = read_lists(lists, _Debris, _patterns_in)
    return _Patterns(
        notice=_any_of([pattern for entry in debris for pattern in entry.notices]),
        counter=_any_of([pattern for entry in debris for pattern in entry.counters]),
        later_counter=_any_of([pattern for entry in debris for pattern in entry.later_counters]),
        tail=_any_of([pattern + r"\Z" for entry in debris for pattern in entry.tails]),
        label=_any_of([pattern for entry in debris for pattern in entry.labels]),
        system=_any_of([pattern for entry in debris for pattern in entry.system]),
    )


def _patterns_in(entry: _Debris) -> list[str]:
    return [*entry.notices, *entry.counters, *entry.later_counters, *entry.tails, *entry.labels, *entry.system]


def _any_of(patterns: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or r"(?!)", re.DOTALL)
