"""`Check`: a rule that an answer meets or not, so that models can be told apart without a judge.

Invariants: a check says yes or no of a text alone, and the same each time; one that any answer or none could meet is refused
where it is read. `PythonCheck` needs the model's code run, which `code_run` does; everything here only reads. It ignores how
good an answer is beyond its rule.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from chaccu.judge.answer_numbers import read_results

_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_MARKERS = {
    "bullet": re.compile(r"[ \t]*[-*•+][ \t]+\S"),
    "dash": re.compile(r"[ \t]*-[ \t]+\S"),
    "number": re.compile(r"[ \t]*\d+[.)][ \t]+\S"),
}
_WRAPPING = " \t\r\n\"'`*_“”‘’"
_HYPHENS = re.compile("[\u2010\u2011]")

_Some = msgspec.Meta(min_length=1)
_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Rule(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """`turn`: from 0, the one whose answer is checked."""

    turn: int = 0


class NumberCheck(_Rule, tag="number", frozen=True, kw_only=True):
    """The result that the answer gives (`answer_numbers` says where it stands) is `value`, within `tolerance`."""

    value: float
    tolerance: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class ExactCheck(_Rule, tag="exact", frozen=True, kw_only=True):
    """The answer is one of `any_of`, but for quotes, emphasis, a final full stop and, unless `case`, case."""

    any_of: Annotated[tuple[str, ...], _Some]
    case: bool = False


class PatternCheck(_Rule, tag="pattern", frozen=True, kw_only=True):
    """The regular expression matches the whole answer, without regard to case unless `case`; a dot is any character."""

    pattern: str
    case: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` where `pattern` is no regular expression."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"the pattern {self.pattern!r} is no regular expression: {error}") from error


class ContainsCheck(_Rule, tag="contains", frozen=True, kw_only=True):
    """The answer has all words of `all`, at least one of `any` if there are some, and none of `none`; whole words, any case."""

    all: tuple[str, ...] = ()
    any: tuple[str, ...] = ()
    none: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises `ValueError` where there is nothing to look for."""
        if not (self.all or self.any or self.none):
            raise ValueError("contains needs words: all, any or none")


class JsonCheck(_Rule, tag="json", frozen=True, kw_only=True):
    """The answer, or its one fenced block, is a JSON object with `keys` (and no other if `only`) and the `values` given."""

    keys: tuple[str, ...] = ()
    only: bool = False
    values: dict[str, Any] = {}


class WordsCheck(_Rule, tag="words", frozen=True, kw_only=True):
    """The answer has at least `least` and at most `most` words, as spaces part them."""

    least: _Count = 0
    most: int | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` where no number of words is right."""
        if self.most is not None and self.most < self.least:
            raise ValueError(f"words: at most {self.most} is less than at least {self.least}")


class StartsCheck(_Rule, tag="starts", frozen=True, kw_only=True):
    """The answer, quotes and emphasis around it aside, begins with `text` as it is written."""

    text: Annotated[str, _Some]


class EndsCheck(_Rule, tag="ends", frozen=True, kw_only=True):
    """The answer, quotes and emphasis around it aside, ends with `text` as it is written."""

    text: Annotated[str, _Some]


class ListCheck(_Rule, tag="list", frozen=True, kw_only=True):
    """The answer has exactly `items` lines with this `marker`; with `only`, no other line but empty ones.

    `bullet` is any of `-`, `*`, `•` and `+`, `dash` is `-` alone, `number` is `1.` or `1)`, whichever number it is.
    """

    items: _Count
    marker: Literal["bullet", "dash", "number"] = "bullet"
    only: bool = False


class LinesCheck(_Rule, tag="lines", frozen=True, kw_only=True):
    """The answer has exactly `count` lines, empty ones aside."""

    count: _Count


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
    """The answer's Python code defines `function`, which returns what each of the `cases` says, all within `timeout_s`.

    `keeps_args`: it leaves what it is given as it was. `without`: built-in functions and modules that the code does not use.
    """

    function: Annotated[str, _Some]
    cases: Annotated[tuple[PythonCase, ...], _Some]
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    keeps_args: bool = False
    without: tuple[str, ...] = ()


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
            return any(abs(number - check.value) <= check.tolerance for number in read_results(text))
        case ExactCheck():
            return _bare(text, case=check.case) in {_bare(one, case=check.case) for one in check.any_of}
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
            return text.startswith(check.text) or text.strip(_WRAPPING).startswith(check.text)
        case EndsCheck():
            return text.endswith(check.text) or text.strip(_WRAPPING).endswith(check.text)
        case ListCheck():
            lines = [line for line in text.splitlines() if line.strip()]
            marked = sum(_MARKERS[check.marker].match(line) is not None for line in lines)
            return marked == check.items and (not check.only or len(lines) == marked)
        case LinesCheck():
            return sum(1 for line in text.splitlines() if line.strip()) == check.count
        case CaseCheck():
            return text.isupper() if check.case == "upper" else text.islower()
        case LanguageCheck():
            return _language(text) == check.code
        case _:
            raise TypeError(f"a check of kind {check_kind(check)} cannot be read off a text")


def read_code_blocks(answer: str) -> list[str]:
    """The fenced blocks of an answer, or all of it where there is none. What of it is code is for the interpreter to say."""
    return _FENCED.findall(answer) or [answer]


def _bare(text: str, *, case: bool) -> str:
    bare = _HYPHENS.sub("-", text.strip(_WRAPPING).removesuffix(".").strip(_WRAPPING))
    return bare if case else bare.casefold()


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _meets_json(text: str, check: JsonCheck) -> bool:
    blocks = _FENCED.findall(text)
    if len(blocks) > 1:
        return False
    try:
        value = msgspec.json.decode(blocks[0] if blocks else text.strip(_WRAPPING))
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
