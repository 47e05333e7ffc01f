"""`read_outcome` and `read_scores`: what a judge's text states, or None.

Invariants: of several statements the last one holds, as a judge may quote an answer first and work towards its verdict; what is
not stated, is out of range or was cut off is None and never a number. A mark that only repeats the instruction ("[[A]] if A is
better") or stands within quotation marks in the middle of the text is none, nor is anything in a quoted line ("> 8 7"). It
ignores whether the judge is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from chaccu.judge.flags import CUT_REASONS
from chaccu.judge.prompts import JudgePrompt
from chaccu.judge.verdicts import Outcome

Scale = tuple[float, float]
SCALE: Scale = (0, 10)

_MARK = re.compile(r"\[\[[ \t]{0,4}([^\[\]\n]{1,24}?)[ \t]{0,4}\]\]")
# What follows a mark of the instruction: `"[[A]]" if assistant A is better`, `"[[C]]" for a tie`; not "[[B]], if only just".
_CONDITION = re.compile(
    r"[\"'”’`*]*,?[ \t]+(?:for a tie\b|(?:if|when)\b"
    r"(?![ \t]+(?:only|by|just|barely|narrowly|slightly|anything|forced|pressed|I)\b))",
    re.I,
)
# What stands before a mark that is the whole of which the mark before it is a part: "[[8]] out of [[10]]".
_OUT_OF = re.compile(r"(?:\]\][ \t]*/|\bout[ \t]+of)[ \t]*\Z", re.I)
_LABEL = re.compile(
    r"(?:(?:my|the|final|overall)[ \t]+){0,3}(?:verdict|rating|score|grade|winner|choice|decision|judge?ment)[ \t]*(?::|is:?)?",
    re.I,
)
_OPENING, _CLOSING = "\"'“‘`«", "\"'”’`»"
_OUTCOME_MARKS: dict[str, Outcome] = {
    "A": "first",
    "B": "second",
    "C": "tie",
    "TIE": "tie",
    "A>B": "first",
    "A>>B": "first",
    "B>A": "second",
    "B>>A": "second",
    "A<B": "second",
    "A<<B": "second",
    "A=B": "tie",
}
_JSON_OUTCOMES: dict[str, Outcome] = {"a": "first", "b": "second", "tie": "tie"}

_QUOTED_LINE = re.compile(r"^[ \t]*>.*$", re.M)
_QUOTE_SIGN = re.compile(r"^[ \t>]+", re.M)
_SCORE = r"(\d+(?:\.\d+)?)(?:[ \t]*/[ \t]*10(?![\d.]*\d)|[ \t]+out[ \t]+of[ \t]+10\b)?"
_PLAIN = re.compile(_SCORE)
_MARKED_PAIR = re.compile(rf"{_SCORE}[ \t]*,[ \t]*{_SCORE}")
# A mark that is meant for a grade, readable or not ("4/5", "8,5", "-1"); not a row of a matrix ("1, 2").
_NUMBER = re.compile(r"[-+−]?\d(?!.*,[ \t])")
# A grade without its mark; not the end of a range ("1-10"), a share of another whole ("4 / 5") or a decimal comma ("8,5").
_GRADE_HEAD = r"\b(?:rating|score|grade)[ \t]*(?:[:=]|is|of)[ \t]*\[?"
_ANY_GRADE = re.compile(rf"{_GRADE_HEAD}[-+−]?\d", re.I)
_GRADE = re.compile(
    rf"{_GRADE_HEAD}{_SCORE}\]?"
    r"(?!\d|[.,]\d|[ \t]*(?:[/%]|stars?\b|[-–][ \t]*\d)|[ \t]+(?:(?:to|or)[ \t]+\d|out[ \t]+of))",
    re.I,
)

_PAIR = rf"{_SCORE}(?:[ \t]*[,|&][ \t]*|[ \t]+and[ \t]+|[ \t]+){_SCORE}"
_WHO = r"(?:Assistant|Answer|Model|Response)[ \t]*#?[ \t]*"
_FIRST, _SECOND = rf"\b{_WHO}[1A]\b", rf"\b{_WHO}[2B]\b"
# Bold and code type around a score; a power, "2 ** 3", has spaces on both sides.
_TYPE = re.compile(r"\*\*(?=\S)|(?<=\S)\*\*|`")
_BLANKS = re.compile(r"[ \t\r]+")
_SCORE_WORD = r"(?:scores?|ratings?|tuple|output|result)"
_LINE = re.compile(
    rf"^[ \t]*(?:(?:[a-z][^\n=:()]{{0,60}})?{_SCORE_WORD}[^\n=:()]{{0,60}}"
    rf"(?:\([ \t]*{_WHO}[1A][^\n()]{{0,60}}\)[ \t]*)?[:=])?"
    rf"[ \t(\[]*{_PAIR}[ \t)\]]*\.?[ \t]*$",
    re.M | re.I,
)
_LABELLED = re.compile(
    r"(?:^[ \t#•-]*|[,;|(][ \t]*|\band[ \t]+)(?:scores?[ \t]+(?:for|of)[ \t]+)?"
    rf"\b{_WHO}([12AB])(?:'s)?(?:[ \t]+(?:overall[ \t]+)?(?:score|rating))?[ \t]*(?:[:=]|[ \t][–-][ \t])[ \t]*"
    rf"(?:(?:\n[ \t•-]*)?(?:score|rating)[ \t]*[:=][ \t]*)?{_SCORE}[ \t]*(?=[().,;|–\n-]|points?\b|and\b|\Z)",
    re.M | re.I,
)
# A score's bracket stands behind a word for it; behind "=" or a full stop a bracket may be a point of the plane.
_BRACKET = re.compile(
    r"\b(?:scores?|ratings?|tuple)\b(?:(?:(?!\bpoints?\b|\bcoordinates?\b)[^\n=.()]){0,200}|[ \t]*=[ \t]*)"
    rf"[(\[][ \t]*{_PAIR}[ \t]*[)\]]",
    re.I,
)
# "Assistant 1 gets 8, Assistant 2 gets 7"; "give Assistant 1 an 8, and Assistant 2 a 7"; "8 to Assistant 1, 7 to Assistant 2".
# Without a word for the giving, a number is as likely the result of the task.
_GIVEN = r"(?:[ \t]*\b(?:a|an|the|as|at|with|score|rating|of)\b|[ \t]*:){0,5}[ \t]*"
_GETS = (
    r"(?:'s)?[ \t]+(?:(?:would|should|will|is|be|has|have)[ \t]+){0,2}"
    r"(?:(?:gets?|receives?|earns?|scores?|deserves?|given|rated|awarded)\b"
    r"|(?:(?:a|the)[ \t]+)?(?:overall[ \t]+)?(?:score|rating)[ \t]+(?:is|of))"
)
_BETWEEN = r"[^\n.]{0,300}?"
_PROSE = (
    re.compile(rf"{_FIRST}{_GETS}{_GIVEN}{_SCORE}(?![\d.]*\d){_BETWEEN}{_SECOND}(?:{_GETS})?{_GIVEN}{_SCORE}\b", re.I),
    re.compile(
        rf"\b(?:give|rate|assign|award|score)[ \t]+{_FIRST}{_GIVEN}{_SCORE}(?![\d.]*\d)"
        rf"{_BETWEEN}{_SECOND}(?:{_GETS})?{_GIVEN}{_SCORE}\b",
        re.I,
    ),
    re.compile(rf"\b{_SCORE}[ \t]+(?:to|for)[ \t]+{_FIRST}{_BETWEEN}\b{_SCORE}[ \t]+(?:to|for)[ \t]+{_SECOND}", re.I),
)
# The part of the text about one assistant, where its score is stated in the part's own words.
_PART = re.compile(rf"^[ \t#•-]*{_WHO}([12AB])\b[^\n:]{{0,40}}:", re.M | re.I)

_CHOICES: dict[str, Outcome] = {"1": "first", "a": "first", "2": "second", "b": "second", "3": "tie", "c": "tie", "tie": "tie"}
_CHOICE_LINE = re.compile(
    r"^[ \t]*(?:(?:my[ \t]+)?(?:final[ \t]+)?(?:verdict|winner|choice|decision|judge?ment|preference)[ \t]*(?:[:=]|is)[ \t]*)?"
    r"(?:(?:assistant|output|answer|model|response|option)[ \t]*)?\(?([123]|[ABC]|tie)\)?[ \t]*\.?[ \t]*$",
    re.M | re.I,
)
_CHOICE_SENTENCE = re.compile(
    r"\b(?:assistant|output|answer|model|response)[ \t]*\(?([12AB])\)?[ \t]+is[ \t]+"
    r"(?:(?:slightly|clearly|much|the)[ \t]+)?better\b",
    re.I,
)


def read_outcome(text: str, prompt: JudgePrompt, finish_reason: str = "") -> Outcome | None:
    """Which of two answers the judge prefers, by what `prompt` asks it to state; None for a prompt of one answer.

    `finish_reason`: as the server gave it. Of a text that was cut off (`CUT_REASONS`) a mark counts where the text ends with it
    in a line of its own: any other is part of what should have led to a verdict.
    """
    if prompt.kind != "pairwise":
        return None
    if prompt.output == "winner":
        return parse_mark(text) if _has_its_end(text, finish_reason) else None
    if prompt.output == "json":
        found = _find_object(_own_words(text), "winner")
        return _JSON_OUTCOMES.get(found.strip().lower()) if isinstance(found, str) else None
    scores = read_scores(text, prompt)
    return compare_scores(scores) if scores else None


def read_scores(text: str, prompt: JudgePrompt, finish_reason: str = "") -> tuple[float, ...] | None:
    """The scores that `prompt` asks for, one for each answer and each within its scale; None where it asks for none.

    `finish_reason`: as in `read_outcome`; two scores come first, and stand though the reason behind them was cut off.
    """
    if prompt.output == "score_pair":
        return parse_scores(text, prompt.scale)
    if prompt.kind == "single" and prompt.output == "score":
        grade = parse_grade(text, prompt.scale) if _has_its_end(text, finish_reason) else None
    elif prompt.kind == "single" and prompt.output == "json":
        grade = _number_within(_find_object(_own_words(text), "score"), prompt.scale)
    else:
        return None
    return None if grade is None else (grade,)


def compare_scores(scores: tuple[float, ...]) -> Outcome:
    """The outcome that two scores state."""
    first, second = scores
    return "first" if first > second else "second" if second > first else "tie"


def parse_mark(text: str) -> Outcome | None:
    """The last of the marks [[A]], [[B]], [[C]] or [[TIE]], and [[A>B]], [[A>>B]], [[A=B]] and so on.

    None where the text ends with another mark, such as [[Neither]]: it is the verdict, and an earlier mark is not.
    """
    text = _own_words(text)
    marks = [(end, mark.upper().replace(" ", "")) for end, mark in _find_marks(text)]
    known = [(end, mark) for end, mark in marks if mark in _OUTCOME_MARKS]
    if not known or (known[-1] != marks[-1] and _is_end(text, marks[-1][0])):
        return None
    return _OUTCOME_MARKS[known[-1][1]]


def parse_grade(text: str, scale: Scale = SCALE) -> float | None:
    """The last mark [[7.5]] or [[7.5/10]]; in a text without marks the "score" of a JSON object, or the last "Rating: 7.5".

    None where that is off the scale, or is a number of another form ([[4/5]], [[8,5]], "Rating: 8 to 9").
    """
    text = _own_words(text)
    marks = [mark for end, mark in _find_marks(text) if _NUMBER.match(mark) or _is_end(text, end)]
    if marks:
        grade = _PLAIN.fullmatch(marks[-1])
    elif _MARK.search(text):
        return None
    else:
        found = _find_object(text, "score")
        if found is not None:
            return _number_within(found, scale)
        plain = _plain(text)
        starts = [match.start() for match in _ANY_GRADE.finditer(plain)]
        grade = _GRADE.match(plain, starts[-1]) if starts else None
    return _within(float(grade[1]), scale) if grade else None


def parse_scores(text: str, scale: Scale = SCALE) -> tuple[float, float] | None:
    """The pair of scores that the judge states last.

    As a mark ([[8, 7]]), alone in a line ("8 7", "8.5, 7", "(8, 7)", "Scores: 8 7"), labelled ("Assistant 1: 8", then
    "Assistant 2: 7") or in a sentence that speaks of scores. A pair off the scale is no statement where numbers of other
    meaning can stand, and makes the result None in a mark or behind "scores:".
    """
    plain = _plain(_own_words(text))
    stated = [
        (end, pair) for end, pair, is_certain in _find_pairs(plain) if is_certain or _pair_within(pair, scale) is not None
    ]
    pair = max(stated)[1] if stated else _pair_of_parts(plain)
    return _pair_within(pair, scale) if pair else None


def parse_choice(text: str) -> Outcome | None:
    """What a judge prefers that was asked for no mark.

    Alone in a line ("2", "Output (a)", "Choice: 2"), or "Output (b) is better". 1 and A are the first
    answer, 2 and B the second, 3, C and "tie" neither. A mark or a JSON object goes before these.
    """
    text = _own_words(text)
    marked = parse_mark(text)
    if marked is not None:
        return marked
    found = _find_object(text, "winner")
    if isinstance(found, str):
        return _JSON_OUTCOMES.get(found.strip().lower())
    plain = _plain(text)
    stated = [(match.end(), match[1].lower()) for form in (_CHOICE_LINE, _CHOICE_SENTENCE) for match in form.finditer(plain)]
    return _CHOICES[max(stated)[1]] if stated else None


def _own_words(text: str) -> str:
    """`text` without the lines that quote somebody else as in Markdown; of a text that is nothing but such lines, the lines."""
    own = _QUOTED_LINE.sub("", text)
    return own if own.strip() else _QUOTE_SIGN.sub("", text)


def _plain(text: str) -> str:
    """`text` without type, and with one blank for several: the search then takes time in proportion to the text."""
    return _BLANKS.sub(" ", _TYPE.sub("", text))


def _within(value: float, scale: Scale) -> float | None:
    return value if scale[0] <= value <= scale[1] else None


def _number_within(value: Any, scale: Scale) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _within(float(value), scale) if is_number and abs(value) < 1e9 else None


def _pair_within(pair: tuple[float, float], scale: Scale) -> tuple[float, float] | None:
    return pair if all(scale[0] <= one <= scale[1] for one in pair) else None


def _find_marks(text: str) -> list[tuple[int, str]]:
    """Where each mark ends that states something, and what it holds.

    One in quotation marks does so alone in its line, and at the end of a text that has no other. Where such an end says
    otherwise than the mark before it, and that one is in mid-sentence, nobody can tell which is the quoted one: none counts.
    """
    free: list[re.Match[str]] = []
    quoted: list[re.Match[str]] = []
    for match in _MARK.finditer(text):
        is_whole = match[1].isdigit() and _OUT_OF.search(text, max(0, match.start() - 12), match.start())
        if not is_whole and not _CONDITION.match(text, match.end()):
            (quoted if _is_quoted(text, match) else free).append(match)
    if quoted and _is_end(text, quoted[-1].end()):
        if not free:
            free = quoted[-1:]
        elif free[-1][1] != quoted[-1][1] and not _is_alone(text, free[-1]):
            free = []
    return [(match.end(), match[1]) for match in free]


def _has_its_end(text: str, finish_reason: str) -> bool:
    """Whether a judge that was to end with a mark came to that: it was not cut off, or only behind the mark."""
    if finish_reason not in CUT_REASONS:
        return True
    marks = list(_MARK.finditer(text))
    return bool(marks) and _is_end(text, marks[-1].end()) and _is_alone(text, marks[-1])


def _is_end(text: str, end: int) -> bool:
    """Whether nothing is said behind `end`."""
    return not text[end:].strip(_CLOSING + "*. \t\r\n")


def _is_alone(text: str, mark: re.Match[str]) -> bool:
    """Whether a mark has its line to itself, but for type and a label such as "My rating is"."""
    start, end = text.rfind("\n", 0, mark.start()) + 1, text.find("\n", mark.end())
    line = text[start : mark.start()] + text[mark.end() : end if end >= 0 else len(text)]
    rest = line.strip(_OPENING + _CLOSING + "*. \t\r")
    return not rest or _LABEL.fullmatch(rest) is not None


def _is_quoted(text: str, mark: re.Match[str]) -> bool:
    """Whether a mark stands in quotation marks, with more in its line than these."""
    before, after = text[max(mark.start() - 1, 0) : mark.start()], text[mark.end() : mark.end() + 1]
    return bool(before and after and before in _OPENING and after in _CLOSING and not _is_alone(text, mark))


def _find_pairs(text: str) -> Iterator[tuple[int, tuple[float, float], bool]]:
    """Each pair that is stated: where its statement ends, the pair, and whether its numbers can be nothing but scores."""
    for end, mark in _find_marks(text):
        if pair := _MARKED_PAIR.fullmatch(mark):
            yield end, (float(pair[1]), float(pair[2])), True
    for match in _LINE.finditer(text):
        is_certain = re.search("score|rating", match[0], re.I) is not None
        yield match.end(), (float(match[1]), float(match[2])), is_certain
    for form in (_BRACKET, *_PROSE):
        for match in form.finditer(text):
            yield match.end(), (float(match[1]), float(match[2])), False
    for one, other in pairwise(_LABELLED.finditer(text)):
        places = one[1] in "1Aa", other[1] in "1Aa"
        if places[0] != places[1]:
            first, second = (one, other) if places[0] else (other, one)
            yield other.end(), (float(first[2]), float(second[2])), False


def _pair_of_parts(text: str) -> tuple[float, float] | None:
    """The grade that the last part about each assistant ends with: "Assistant 1: … Therefore, the score is 8."."""
    starts = list(_PART.finditer(text))
    grades: dict[bool, float] = {}
    for number, start in enumerate(starts, start=1):
        end = starts[number].start() if number < len(starts) else len(text)
        if found := list(_GRADE.finditer(text, start.end(), end)):
            grades[start[1] in "1Aa"] = float(found[-1][1])
    return (grades[True], grades[False]) if len(grades) == 2 else None


def _find_object(text: str, key: str) -> Any:
    """The value of `key` in the last JSON object of `text` that has it; None where an object behind it is broken or cut off."""
    decoder, found, position = json.JSONDecoder(), None, 0
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = start + 1
            if re.match(r'\{\s*(?:"|\Z)', text[start : start + 200]):
                found = None
            continue
        if isinstance(value, dict) and key in value:
            found = value[key]
    return found
