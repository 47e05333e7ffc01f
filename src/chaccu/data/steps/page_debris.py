"""Page debris: what the page that a conversation was copied from left in its texts.

Rounds go whose answer is the page's own message (a rate limit, a network error). Cut out, and nothing beside it: the counter
of a regenerated answer ("2 / 3") where it begins, the copy button's tail ("Copy123 chars / 45 words") and the policy notice
at the end, button labels on lines of their own in answers, a system text that only says where the conversation was shared.
What is looked for is in `page_debris.yaml` and in lists of one's own. A counter that has two numbers counts as one only when
the first is not above the second; the shipped ones look, besides, that what follows could not be part of a sum.

The shipped list is looked for only where it can be found, which is far faster; of other lists nothing is known, so they are
looked for everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import ClassVar

import msgspec

from chaccu.conversation import Conversation, Message
from chaccu.data.outcome import Changed, Drop, Outcome, Step
from chaccu.data.rounds import Round, join_rounds, split_rounds
from chaccu.data.steps.word_lists import describe_lists, locate_lists, read_lists

_COUNTER_NUMBERS = re.compile(r"(?<!\d)(\d{1,9}) / (\d{1,9})(?!\d)")
_COUNTER = "page counter cut"
_TAIL = "page tail cut"
_LABEL = "button label cut"
_NOTICE = "answer is a page notice"
_SYSTEM = "share note in the system text cut"
_SHIPPED = "page_debris"
# The shipped list's notices are no longer, and its tails begin no further from the end.
_SHIPPED_CHARS = 400
_Any = tuple[re.Pattern[str], ...]


class _Debris(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A list file: regular expressions by place."""

    notices: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    later_counters: tuple[str, ...] = ()
    tails: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    system: tuple[str, ...] = ()


class _Compiled(msgspec.Struct, frozen=True):
    """A list's patterns, each by itself, so that groups are those of the pattern; whether it is the shipped list."""

    notices: _Any
    counters: _Any
    later_counters: _Any
    tails: _Any
    labels: _Any
    system: _Any
    shipped: bool


class PageDebris(Step, frozen=True):
    """`questions`: whether counters and tails are cut from questions too, to the character; else questions stay as they are.
    `lists`: the shipped list, and files of the same form."""

    name: ClassVar[str] = "page_debris"

    questions: bool = True
    lists: tuple[str, ...] = (_SHIPPED,)

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "lists", locate_lists(self.lists))
        _compile(self.lists)

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "lists": describe_lists(self.lists)}

    def __call__(self, conversation: Conversation) -> Outcome:
        lists = _compile(self.lists)
        reasons: list[str] = []
        if conversation.system is not None and _is_share_note(lists, conversation.system.strip()):
            conversation = msgspec.structs.replace(conversation, system=None)
            reasons.append(_SYSTEM)
        rounds: list[Round] = []
        for turns in split_rounds(conversation.messages):
            if any(message.role == "assistant" and _is_notice(lists, message.content or "") for message in turns):
                reasons.append(_NOTICE)
                continue
            rounds.append(tuple(self._repair(lists, message, reasons) for message in turns))
        if not reasons:
            return conversation
        return Changed((join_rounds(conversation, rounds),), tuple(reasons)) if rounds else Drop(reasons[-1])

    def _repair(self, lists: tuple[_Compiled, ...], message: Message, reasons: list[str]) -> Message:
        text = message.content or ""
        if message.role == "tool" or (message.role == "user" and not self.questions):
            return message
        repaired = _cut_tail(lists, text, reasons)
        repaired = _cut_counter(lists, repaired, reasons)
        if message.role == "assistant":
            repaired = _cut_labels(lists, repaired, reasons)
        return message if repaired == text else Message(message.role, repaired)


def _is_share_note(lists: tuple[_Compiled, ...], system: str) -> bool:
    return any(pattern.fullmatch(system) for entry in lists for pattern in entry.system)


def _is_notice(lists: tuple[_Compiled, ...], text: str) -> bool:
    notices = [pattern for entry in lists if not entry.shipped or len(text) <= _SHIPPED_CHARS for pattern in entry.notices]
    return bool(notices) and all(
        any(pattern.fullmatch(paragraph.strip()) for pattern in notices) for paragraph in text.split("\n\n")
    )


def _cut_tail(lists: tuple[_Compiled, ...], text: str, reasons: list[str]) -> str:
    end = len(text)
    for entry in lists:
        begin = max(0, len(text) - _SHIPPED_CHARS) if entry.shipped else 0
        for pattern in entry.tails:
            if (found := pattern.search(text, begin)) is not None:
                end = min(end, found.start())
    if end == len(text):
        return text
    reasons.append(_TAIL)
    return text[:end]


def _cut_counter(lists: tuple[_Compiled, ...], text: str, reasons: list[str]) -> str:
    for entry in lists:
        found = _find_counter(entry, text)
        if found is not None and found[0] and _counts(found[0]):
            reasons.append(_COUNTER)
            return text[: found.start()] + text[found.end() :].removeprefix("\n")
    return text


def _find_counter(entry: _Compiled, text: str) -> re.Match[str] | None:
    """The counter at the beginning, or else the first of the later ones."""
    for pattern in entry.counters:
        if (found := pattern.match(text)) is not None:
            return found
    if entry.shipped and " / " not in text:
        return None
    later = [found for pattern in entry.later_counters if (found := pattern.search(text)) is not None]
    return min(later, key=re.Match.start, default=None)


def _counts(counter: str) -> bool:
    """Whether a counter's numbers, if it has two, are a place and how many places there are."""
    numbers = _COUNTER_NUMBERS.search(counter)
    return numbers is None or (1 <= int(numbers[1]) <= int(numbers[2]) and int(numbers[2]) >= 2)


def _cut_labels(lists: tuple[_Compiled, ...], text: str, reasons: list[str]) -> str:
    cut = text
    for entry in lists:
        if entry.shipped and "opy code" not in text:
            continue
        for label in entry.labels:
            lines = cut.split("\n")
            kept = [line if (found := label.fullmatch(line)) is None else _left_of(found) for line in lines]
            if kept != lines:
                cut = "\n".join(line for line in kept if line is not None)
    if cut != text:
        reasons.append(_LABEL)
    return cut


def _left_of(label: re.Match[str]) -> str | None:
    """What stays of a label's line: what its first group matches, if that is anything."""
    return (label[1] or None) if label.re.groups else None


@lru_cache(maxsize=16)
def _compile(lists: tuple[str, ...]) -> tuple[_Compiled, ...]:
    entries = read_lists(lists, _Debris, _patterns_in)
    return tuple(_compile_list(name, entry) for name, entry in zip(lists, entries, strict=True))


def _compile_list(name: str, entry: _Debris) -> _Compiled:
    return _Compiled(
        notices=_compile_all(entry.notices),
        counters=_compile_all(entry.counters),
        later_counters=_compile_all(entry.later_counters),
        tails=_compile_all(map(_at_the_end, entry.tails)),
        labels=_compile_all(entry.labels),
        system=_compile_all(entry.system),
        shipped=name == _SHIPPED,
    )


def _patterns_in(entry: _Debris) -> list[str]:
    places = (entry.notices, entry.counters, entry.later_counters, entry.tails, entry.labels, entry.system)
    return [*chain.from_iterable(places), *map(_at_the_end, entry.tails)]


def _at_the_end(pattern: str) -> str:
    return rf"(?:{pattern})\Z"


def _compile_all(patterns: Iterable[str]) -> _Any:
    return tuple(re.compile(pattern, re.DOTALL) for pattern in patterns)
