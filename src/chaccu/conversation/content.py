"""`Content`: a message's text inside a template.

Job: let a template test and cut a message's text as it likes, while what it writes of it stays recognisable. What Python's own
string code sees of a `Content` is only a mark with a number; its methods answer for the text itself, and whatever they cut out
of it is again a `Content`. Invariant: no operation turns a message's text into template text. One that is not foreseen here
works on the mark and writes a wrong text, never an unmarked one; `TokenizerFormat` finds that by comparison, and the formats
written for this package may use only the filters that are known to be right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MARK = "\x00"

_ANSWERED = (
    *("strip", "lstrip", "rstrip", "replace", "removeprefix", "removesuffix", "split", "rsplit", "splitlines"),
    *("partition", "rpartition", "lower", "upper", "title", "capitalize", "casefold", "swapcase"),
    *("startswith", "endswith", "find", "rfind", "index", "rindex", "count"),
    *("isspace", "isalpha", "isdigit", "isdecimal", "isnumeric", "isalnum", "isupper", "islower", "istitle", "isascii"),
    *("__contains__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__len__", "__hash__", "__getitem__"),
)


def _text_of(value: Any) -> Any:
    return value._contents.texts[value._number] if isinstance(value, Content) else value


def _wrap(origin: Content, result: Any) -> Any:
    if isinstance(result, str):
        contents, number = origin._contents, origin._number
        return origin if result == contents.texts[number] else contents.add(result, contents.owners[number])
    if isinstance(result, list | tuple):
        return type(result)(_wrap(origin, part) for part in result)
    return result


def _answer_for_the_text(name: str) -> Any:
    method = getattr(str, name)

    def answer(self: Content, *args: Any, **kwargs: Any) -> Any:
        return _wrap(self, method(_text_of(self), *map(_text_of, args), **kwargs))

    answer.__name__ = name
    return answer


def _with_answers(cls: type[Content]) -> type[Content]:
    for name in _ANSWERED:
        setattr(cls, name, _answer_for_the_text(name))
    return cls


@_with_answers
class Content(str):
    """See the module. Made by `Contents.add`."""

    __slots__ = ("_contents", "_number")
    _contents: Contents
    _number: int

    def __new__(cls, contents: Contents, number: int) -> Content:
        content = super().__new__(cls, f"{MARK}{number}{MARK}")
        content._contents, content._number = contents, number
        return content

    def __iter__(self) -> Iterator[str]:
        return (_wrap(self, character) for character in _text_of(self))


class Contents:
    """The contents of one rendering, by number. `owner`: index of the message that a content is of, -1 for the system text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.owners: list[int] = []

    def add(self, text: str, owner: int) -> Content:
        """A content with the next number."""
        self.texts.append(text)
        self.owners.append(owner)
        return Content(self, len(self.texts) - 1)
