"""`read_results`: the numbers that an answer may give as its result, in the forms that models write them.

Invariants: a number is taken from a place where a result stands (a box, the end, a first line by itself), never from anywhere
in the text, so an answer that mentions the right number on its way to a wrong one has not given it. Number words are read only
in a text without digits. It ignores units, signs of currency and per cent.
"""

from __future__ import annotations

import re

_GROUPING = re.compile("[,\u00a0\u202f]")
_WHOLE = rf"(?:\d{{1,3}}(?:{_GROUPING.pattern}\d{{3}})+|\d+)"
_NUMBER = re.compile(rf"(?<![\w.])[-−+]?(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:/[1-9]\d*)?(?!\d)")
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
# Around a number that stands by itself in a line: spaces, emphasis, quotes, the signs of a formula.
_AROUND_A_NUMBER = " \t\r\"'`*_$()[]\\"

_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"]
_UNITS += ["fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = dict(zip([*_UNITS, *_TENS], [*range(20), *range(20, 100, 10)], strict=True))
_ONE = "|".join(_UNITS)
_TO_99 = rf"(?:(?:{'|'.join(_TENS)})(?:[-\u2010\u2011\s](?:{_ONE}))?|{_ONE})"
_TO_999 = rf"(?:(?:an?|{_ONE})\s+hundred(?:\s+(?:and\s+)?{_TO_99})?|{_TO_99})"
_WORDS = re.compile(
    rf"\b(minus\s+|negative\s+)?((?:an?|{_TO_999})\s+thousand(?:,?\s+(?:and\s+)?{_TO_999})?|{_TO_999})\b", re.IGNORECASE
)


def read_results(answer: str) -> list[float]:
    """What an answer may mean by its result; empty where it holds no number.

    That is what its last `\\boxed{…}` holds; without a box its last number and, where a number stands by itself in the first
    line, before an explanation, that one too.
    """
    text = _plain(answer)
    boxes = _BOX.findall(text)
    if boxes:
        return _read_last(boxes[-1])
    first, _, rest = text.strip().partition("\n")
    first = first.strip(_AROUND_A_NUMBER).removesuffix(".").strip(_AROUND_A_NUMBER)
    alone = read_numbers(first) if rest and _NUMBER.fullmatch(first) else []
    return _read_last(text) + alone


def read_numbers(text: str) -> list[float]:
    """All numbers in digits of a text, in order: `-3`, `1,234.5`, `.5`, `3/4`."""
    numbers = []
    for match in _NUMBER.finditer(text):
        whole, _, divisor = _GROUPING.sub("", match[0]).replace("−", "-").partition("/")
        numbers.append(float(whole) / float(divisor or 1))
    return numbers


def _plain(text: str) -> str:
    """LaTeX's fractions and groups of digits as plain text has them."""
    return _FRACTION.sub(r"\1/\2", text.replace("{,}", ",").replace("\\,", "").replace("\\!", ""))


def _read_last(text: str) -> list[float]:
    return (read_numbers(text) or _read_words(text))[-1:]


def _read_words(text: str) -> list[float]:
    return [(-1 if minus else 1) * _value_of(words) for minus, words in _WORDS.findall(text)]


def _value_of(words: str) -> float:
    total = current = 0
    for word in re.findall("[a-z]+", words.lower()):
        if word == "hundred":
            current *= 100
        elif word == "thousand":
            total, current = 1000 * current, 0
        elif word in ("a", "an"):
            current = 1
        elif word != "and":
            current += _VALUES[word]
    return float(total + current)
