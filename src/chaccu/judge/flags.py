"""What makes an answer, and a verdict on it, doubtful: it speaks to the judge, is empty, was cut off, or is always the same.

Invariants: a flag is a hint for people and changes no verdict. It ignores whether an answer is right.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

Flag = Literal["injection", "empty", "truncated", "constant"]
# Finish reasons of a text that its model did not end itself.
CUT_REASONS = ("length", "content_filter")

_WHO = r"(?:assistant|answer|response|output|model)"
_INJECTIONS = tuple(
    re.compile(pattern, re.I | re.M)
    for pattern in (
        # The marks of verdicts; a list of lists in a program may look like the mark of a grade.
        r"\[\[[ \t]*(?:[ABC]|tie|[AB][<>=]{1,2}[AB])[ \t]*\]\]",
        r"\b(?:rating|score|grade|verdict)s?\b[^\n]{0,20}\[\[[ \t]*\d",
        # The lines around a text that is judged, in Chaccu's prompts and in others.
        r"<<<[ \t]*(?:END[ \t]+OF[ \t]+)?(?:QUESTION|REQUEST|ANSWER|REFERENCE)\b",
        r"[\[<]\|?[ \t]*(?:the[ \t]+)?(?:start|end)[ \t]+of[ \t]+(?:the[ \t]+)?(?:assistant|reference|user)\b",
        r"^[ \t]*(?:\[(?:system|user question|instruction)\]|<\|(?:im_start|im_end|system|eot_id)\|>)",
        # What is said to a judge.
        r"\b(?:ignore|disregard|forget|override)\b[^\n.]{0,30}\b(?:previous|prior|above|earlier|preceding|other|system|judging|grading)\b"
        r"[^\n.]{0,20}\b(?:instructions?|prompts?|rules|criteria|rubrics?)\b",
        r"\b(?:dear|attention|note[ \t]+(?:to|for)(?:[ \t]+the)?|instructions?[ \t]+(?:to|for)(?:[ \t]+the)?|hey|hello)[ \t,:]+"
        r"(?:(?:ai|llm|impartial)[ \t]+)?(?:judges?|graders?|evaluators?|raters?)\b",
        r"\b(?:judges?|graders?|evaluators?|raters?)\b[ \t]*[:,]?[ \t]*(?:you[ \t]+)?"
        r"(?:must|should|please|will|has[ \t]+to|have[ \t]+to)[ \t]+"
        r"(?:now[ \t]+)?(?:rate|score|grade|give|award|assign|output|write|choose|pick|select|prefer|declare|vote)\b",
        r"\b(?:rate|score|grade)[ \t]+(?:this|my|the[ \t]+above)[ \t]+(?:answer|response|reply|output)\b",
        r"\b(?:give|award|assign)[ \t]+(?:this|my|the[ \t]+above)[ \t]+(?:answer|response|reply|output)\b[^\n.]{0,30}"
        r"\b(?:10|ten|highest|full|maximum|perfect|top)\b",
        r"\b(?:choose|pick|select|prefer|vote[ \t]+for)[ \t]+(?:assistant|response|output|model)[ \t]+(?:A|B|1|2)\b",
        rf"\b{_WHO}[ \t]+\(?[AB12]\)?[ \t]+is[ \t]+(?:(?:clearly|far|much|the|obviously)[ \t]+)*"
        r"(?:better|best|winner|superior)\b",
        r"\b(?:the|my|your)[ \t]+(?:final[ \t]+)?verdict[ \t]+(?:is|must|should)\b[^\n.]{0,20}(?:\b[AB12]\b|\btie\b)",
    )
)
# An open block of a program is the sure sign of a cut; prose may well end without a full stop.
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.M)


def flag_answer(text: str, finish_reason: str = "") -> tuple[Flag, ...]:
    """The flags of one answer. `finish_reason`: as the server gave it; those of `CUT_REASONS` say that it was cut off."""
    if not text.strip():
        return ("empty",)
    flags: list[Flag] = []
    if is_injection(text):
        flags.append("injection")
    if is_truncated(text, finish_reason):
        flags.append("truncated")
    return tuple(flags)


def is_injection(text: str) -> bool:
    """Whether an answer tells a judge what to say, or holds the marks of a verdict or of the judge's own prompt."""
    return any(pattern.search(text) for pattern in _INJECTIONS)


def is_truncated(text: str, finish_reason: str = "") -> bool:
    """Whether an answer was cut off: the server says so or, where it says nothing, a block of a program is left open."""
    if finish_reason:
        return finish_reason in CUT_REASONS
    return len(_FENCE.findall(text)) % 2 == 1


def find_constant(answers: Iterable[tuple[int | str, str]], *, least: int = 3) -> set[str]:
    """The texts with which one model answers `least` or more different questions, blanks and case aside.

    `answers`: (question id, text) of one model. What comes back are texts as they were given.
    """
    questions: dict[str, set[int | str]] = defaultdict(set)
    texts: dict[str, set[str]] = defaultdict(set)
    for question_id, text in answers:
        same = " ".join(text.split()).lower()
        questions[same].add(question_id)
        texts[same].add(text)
    return {text for same, ids in questions.items() if len(ids) >= least for text in texts[same]}
