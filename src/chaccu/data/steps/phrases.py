"""Phrases: rounds or conversations go by what their texts say, judged by rules with thresholds, never by one word in passing.

A rule says what it looks for (phrases, or regular expressions), where (a share of texts' beginnings or ends, or anywhere),
and how often in one text before that text counts. A step says what follows: the round of a text that counts goes, or the
whole conversation, once enough of its rounds count. `refusals` looks at answers, `moderation` at questions and answers; they
differ in nothing but the shipped list (`refusals.yaml`, `moderation.yaml`) and the names of its rules that are in force.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import msgspec

from chaccu.conversation import Conversation, Message
from chaccu.data.outcome import Drop, Outcome, Step, filter_rounds
from chaccu.data.rounds import Round, split_rounds
from chaccu.data.steps.word_lists import describe_lists, locate_lists, read_lists
from chaccu.errors import RecipeError, did_you_mean

Count = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`phrases`: words as they stand, white space and apostrophes of any kind, case ignored, at word boundaries; `patterns`:
    regular expressions, looked for only in texts that hold one of `needs` (small letters), which is far faster. A text
    counts when they are found `at_least` times in the answers' or questions' (`of`) part that `where` names: their first or
    last `within_chars` characters, or all."""

    name: str
    phrases: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    of: Literal["answers", "questions", "both"] = "answers"
    where: Literal["start", "end", "anywhere"] = "anywhere"
    within_chars: Count = 200
    at_least: Count = 1

    def __post_init__(self) -> None:
        if not all(phrase.strip() for phrase in self.phrases):
            raise ValueError(f"the rule {self.name!r} has a blank phrase")


class RuleList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A list file."""

    rules: tuple[Rule, ...]


class _Compiled(msgspec.Struct, frozen=True):
    """A rule, its pattern, and words of which every text that it finds has one (empty: not known)."""

    rule: Rule
    pattern: re.Pattern[str]
    needs: tuple[str, ...]


class Phrases(Step, frozen=True):
    """`rules`: names of the rules in force (empty: all); `lists`: the shipped list and files of the same form; `drop`: the
    round, or the conversation; a conversation goes as a whole too once `whole_share` of its rounds count."""

    lists: tuple[str, ...]
    rules: tuple[str, ...] = ()
    drop: Literal["round", "conversation"] = "round"
    whole_share: Share = 1.0

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "lists", locate_lists(self.lists))
        known = {entry.rule.name for entry in _compile(self.lists, ())}
        for rule in self.rules:
            if rule not in known:
                raise RecipeError(f"{self.name}: there is no rule {rule!r}.", remedy=did_you_mean(rule, known))

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "lists": describe_lists(self.lists)}

    def __call__(self, conversation: Conversation) -> Outcome:
        rules = _compile(self.lists, self.rules)
        found: list[str] = []

        def judge(turns: Round) -> str | None:
            reason = next((reason for message in turns if (reason := _find_rule(rules, message)) is not None), None)
            if reason is not None:
                found.append(reason)
            return reason

        outcome = filter_rounds(conversation, judge)
        if found and (self.drop == "conversation" or len(found) >= self.whole_share * len(split_rounds(conversation.messages))):
            return Drop(found[0])
        return outcome


class Refusals(Phrases, frozen=True):
    """Answers that refuse, or speak as the product of another maker."""

    name: ClassVar[str] = "refusals"

    lists: tuple[str, ...] = ("refusals",)


class Moderation(Phrases, frozen=True):
    """Texts that nobody should learn to write."""

    name: ClassVar[str] = "moderation"

    lists: tuple[str, ...] = ("moderation",)


def _find_rule(rules: tuple[_Compiled, ...], message: Message) -> str | None:
    """Name of the first rule by which the message's text counts."""
    text = message.content or ""
    kinds = {"assistant": ("both", "answers"), "user": ("both", "questions")}.get(message.role, ())
    applicable = [entry for entry in rules if entry.rule.of in kinds]
    lowered = text.lower() if applicable else ""
    for entry in applicable:
        rule = entry.rule
        if entry.needs and not any(word in lowered for word in entry.needs):
            continue
        part = text
        if rule.where != "anywhere":
            part = text[: rule.within_chars] if rule.where == "start" else text[-rule.within_chars :]
        if rule.at_least == 1:
            if entry.pattern.search(part):
                return rule.name
        elif sum(1 for _ in entry.pattern.finditer(part)) >= rule.at_least:
            return rule.name
    return None


@lru_cache(maxsize=32)
def _compile(lists: tuple[str, ...], names: tuple[str, ...]) -> tuple[_Compiled, ...]:
    rules = [
        rule for entry in read_lists(lists, RuleList, _patterns_in) for rule in entry.rules if not names or rule.name in names
    ]
    return tuple(_Compiled(rule, re.compile(_pattern_of(rule), re.IGNORECASE), _needs_of(rule)) for rule in rules)


def _patterns_in(entry: RuleList) -> list[str]:
    """Each by itself, which tells a mistake best, and those of each rule together, as they are used."""
    return [pattern for rule in entry.rules for pattern in (*rule.patterns, _pattern_of(rule))]


def _pattern_of(rule: Rule) -> str:
    wanted = [rf"\b{_phrase_pattern(phrase)}\b" for phrase in rule.phrases] + [rf"(?:{pattern})" for pattern in rule.patterns]
    return "|".join(wanted) or r"(?!)"


def _needs_of(rule: Rule) -> tuple[str, ...]:
    """The longest word of each phrase, up to an apostrophe, and what the rule says its patterns need."""
    if rule.patterns and not rule.needs:
        return ()
    longest = (max((word.split("'")[0] for word in phrase.lower().split()), key=len) for phrase in rule.phrases)
    return tuple(dict.fromkeys((*longest, *rule.needs)))


def _phrase_pattern(phrase: str) -> str:
    """The phrase with any white space between its words and either kind of apostrophe."""
    return r"\s+".join(re.escape(word) for word in phrase.split()).replace("'", "['’]")
