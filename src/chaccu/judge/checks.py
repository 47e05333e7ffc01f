"""`Check`: a rule that an answer meets or not, so that models can be told apart without a judge.

Invariants: a check says yes or no of a text alone, and the same each time; an answer is read as it was given, but for the
surrounding spaces. `PythonCheck` needs the model's code run, which `code_run` does; everything here only reads. It ignores how
good an answer is beyond its rule.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeAlias

import msgspec

_GROUPING = re.compile("[,\u00a0\u202f]")
_NUMBER = re.compile(rf"(?<![\w.])[-−+]?(?:\d{{1,3}}(?:{_GROUPING.pattern}\d{{3}})+|\d+)(?:\.\d+)?(?:/[1-9]\d*)?(?!\d)")
_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BULLET = re.compile(r"[ \t]*[-*•+][ \t]+\S")
_NUMBERED = re.compile(r"[ \t]*\d+[.)][ \t]+\S")
_WRAPPING = " \t\r\n\"'`*“”‘’"


class _Rule(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """`turn`: from 0, the one whose answer is checked."""

    turn: int = 0


class NumberCheck(_Rule, tag="number", frozen=True, kw_only=True):
    """The last number of the answer is `value`, within `tolerance`. Digits may be grouped (1,000), fractions are read (3/4)."""

    value: float
    tolerance: float = 0.0


class ExactCheck(_Rule, tag="exact", frozen=True, kw_only=True):
    """The answer is one of `any_of`, but for case, quotes, emphasis and a final full stop (`strictly`: as it is)."""

    any_of: tuple[str, ...]
    strictly: bool = False


class PatternCheck(_Rule, tag="pattern", frozen=True, kw_only=True):
    """The regular expression matches the whole answer, without regard to case unless `case`."""

    pattern: str
    case: bool = False


class ContainsCheck(_Rule, tag="contains", frozen=True, kw_only=True):
    """The answer has all words of `all`, at least one of `any` if there are some, and none of `none`; whole words, any case."""

    all: tuple[str, ...] = ()
    any: tuple[str, ...] = ()
    none: tuple[str, ...] = ()


class JsonCheck(_Rule, tag="json", frozen=True, kw_only=True):
    """The answer, or its one fenced block, is a JSON object with `keys` (and no other if `only`) and the `values` given."""

    keys: tuple[str, ...] = ()
    only: bool = False
    values: dict[str, Any] = {}


class WordsCheck(_Rule, tag="words", frozen=True, kw_only=True):
    """The answer has at least `least` and at most `most` words, as spaces part them."""

    least: int = 0
    most: int | None = None


class StartsCheck(_Rule, tag="starts", frozen=True, kw_only=True):
    """The answer begins with `text`, as it is written."""

    text: str


class EndsCheck(_Rule, tag="ends", frozen=True, kw_only=True):
    """The answer ends with `text`, as it is written."""

    text: str


class ListCheck(_Rule, tag="list", frozen=True, kw_only=True):
    """The answer has exactly `items` lines that are bullets, or numbered; with `only`, no other line but empty ones."""

    items: int
    marker: Literal["bullet", "number"] = "bullet"
    only: bool = False


class LinesCheck(_Rule, tag="lines", frozen=True, kw_only=True):
    """The answer has exactly `count` lines, empty ones aside."""

    count: int


class CaseCheck(_Rule, tag="case", frozen=True, kw_only=True):
    """All letters of the answer are of one case, and there is at least one."""

    case: Literal["upper", "lower"]


class LanguageCheck(_Rule, tag="language", frozen=True, kw_only=True):
    """The answer is in the language of this ISO 639-1 code, as CLD2 sees it."""

    code: str


class PythonCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call of the function and what it returns; values as JSON has them (a tuple counts as a list)."""

    args: tuple[Any, ...]
    returns: Any


class PythonCheck(_Rule, tag="python", frozen=True, kw_only=True):
    """The answer's Python code defines `function`, which returns what each of the `cases` says, all within `timeout_s`."""

    function: str
    cases: tuple[PythonCase, ...]
    timeout_s: float = 5.0


Check: TypeAlias = (
    NumberCheck
    | ExactCheck
    | PatternCheck
    | ContainsCheck
    | JsonCheck
    | WordsCheck
    | StartsCheck
    | EndsCheck
    | ListCheck
    | LinesCheck
    | CaseCheck
    | LanguageCheck
    | PythonCheck
)


def check_kind(check: Check) -> str:
    """The name of a check's kind, as a question file has it."""
    return str(check.__struct_config__.tag)


def meets_check(answer: str, check: Check) -> bool:
    """Whether `answer` meets `check`; for all kinds but `PythonCheck`, which raises `TypeError`."""
    text = answer.strip()
    match check:
        case NumberCheck():
            numbers = read_numbers(text)
            return bool(numbers) and abs(numbers[-1] - check.value) <= check.tolerance
        case ExactCheck():
            return text in check.any_of if check.strictly else _bare(text) in {_bare(one) for one in check.any_of}
        case PatternCheck():
            return re.fullmatch(check.pattern, text, re.DOTALL | (0 if check.case else re.IGNORECASE)) is not None
        case ContainsCheck():
            found = all(_has_word(text, one) for one in check.all) and not any(_has_word(text, one) for one in check.none)
            return found and (not check.any or any(_has_word(text, one) for one in check.any))
        case JsonCheck():
            return _meets_json(text, check)
        case WordsCheck():
            return check.least <= len(text.split()) <= (check.most if check.most is not None else len(text))
        case StartsCheck():
            return text.startswith(check.text)
        case EndsCheck():
            return text.endswith(check.text)
        case ListCheck():
            lines = [line for line in text.splitlines() if line.strip()]
            marked = sum((_BULLET if check.marker == "bullet" else _NUMBERED).match(line) is not None for line in lines)
            return marked == check.items and (not check.only or len(lines) == marked)
        case LinesCheck():
            return sum(1 for line in text.splitlines() if line.strip()) == check.count
        case CaseCheck():
            return text.isupper() if check.case == "upper" else text.islower()
        case LanguageCheck():
            return _language(text) == check.code
        case _:
            raise TypeError(f"a check of kind {check_kind(check)} cannot be read off a text")


def read_numbers(text: str) -> list[float]:
    """All numbers of a text, in order: `-3`, `1,234.5`, `3/4`."""
    numbers = []
    for match in _NUMBER.finditer(text):
        whole, _, divisor = _GROUPING.sub("", match[0]).replace("−", "-").partition("/")
        numbers.append(float(whole) / float(divisor or 1))
    return numbers


def read_code(answer: str) -> str:
    """The code of an answer: its fenced blocks, one after the other, or all of it where there is none."""
    blocks = _FENCED.findall(answer)
    return "\n".join(blocks) if blocks else answer


def _bare(text: str) -> str:
    return text.strip(_WRAPPING).removesuffix(".").strip(_WRAPPING).casefold()


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _meets_json(text: str, check: JsonCheck) -> bool:
    blocks = _FENCED.findall(text)
    if len(blocks) > 1:
        return False
    try:
        value = msgspec.json.decode(blocks[0] if blocks else text)
    except (msgspec.DecodeError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    wanted = {*check.keys, *check.values}
    exact = value.keys() == wanted if check.only else wanted <= value.keys()
    return exact and all(_same(value[name], one) for name, one in check.values.items())


def _same(value: Any, wanted: Any) -> bool:
    # true is not 1, though Python has them equal.
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _language(text: str) -> str:
    import pycld2

    try:
        _, _, ((_, code, _, _), *_) = pycld2.detect(text.encode("utf-8"), bestEffort=True)
    except pycld2.error:
        # Text that is no text (stray control characters) is in no language.
        return ""
    return str(code)
