"""Windows of an answer: how an answer that is too long for one training row is trained all the same.

A window has the whole question, then reads the end of the window before it and trains what follows. Invariant: every character
of the answer is trained in exactly one window, in order. Windows end before blank space, at a line where one is near, so that
each is tokenised as the whole answer is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from chaccu.conversation import Message

OMITTED = "\n[…]\n"

# Blank space goes with the word behind it; what has none is cut after so many characters: fewer from U+2E80 on, Chinese and
# the like, where a character may be several tokens.
_WORD = re.compile(r"\s*(?:[^\s\u2e80-\U0010ffff]{1,24}|\S{1,8})(?:\s+\Z)?")
# Of a window's tokens: how many may be read again from the window before, and how many may be given up to end with a line.
_CONTEXT_SHARE, _LINE_SHARE = 1 / 4, 1 / 4


class _Window(NamedTuple):
    """Words `[begin, end)`, trained from `trained` on."""

    begin: int
    trained: int
    end: int


def cut_answer(answer: str, room: int, count_tokens: Callable[[Sequence[str]], list[int]]) -> list[Message]:
    """`answer` in windows of about `room` tokens; `count_tokens` counts them for each of several texts.

    Empty when `room` is too small for any window.
    """
    words = _WORD.findall(answer)
    if not words:
        return []
    windows = _find_windows(words, count_tokens(words), room)
    return [_make_message(words, window) for window in windows]


def omit_middle(question: str, room: int, count_tokens: Callable[[Sequence[str]], list[int]]) -> str:
    """`question` in about `room` tokens: its beginning and its end, where a request usually stands, and `OMITTED` between."""
    words = _WORD.findall(question)
    sizes = count_tokens([*words, OMITTED])
    half = (room - sizes.pop()) // 2
    head = _advance(sizes, 0, half)
    tail = len(words) - _advance(sizes[::-1], 0, half)
    return question if tail <= head else "".join(words[:head]).rstrip() + OMITTED + "".join(words[tail:]).lstrip()


def _find_windows(words: list[str], sizes: list[int], room: int) -> list[_Window]:
    windows: list[_Window] = []
    begin = trained = 0
    while trained < len(words):
        end = _advance(sizes, trained, room - sum(sizes[begin:trained]))
        if end == trained:
            return []
        if end < len(words):
            least = _advance(sizes, trained, int((1 - _LINE_SHARE) * (room - sum(sizes[begin:trained]))))
            end = next((place for place in range(end, max(least, trained), -1) if _begins_line(words[place])), end)
        windows.append(_Window(begin, trained, end))
        begin = trained = end
        left = int(room * _CONTEXT_SHARE)
        while begin > 0 and sizes[begin - 1] <= left:
            begin -= 1
            left -= sizes[begin]
        begin = next((place for place in range(begin, trained) if _begins_line(words[place])), begin)
    return windows


def _advance(sizes: list[int], place: int, tokens: int) -> int:
    """The first place to which `tokens` do not reach."""
    while place < len(sizes) and sizes[place] <= tokens:
        tokens -= sizes[place]
        place += 1
    return place


def _begins_line(word: str) -> bool:
    return "\n" in word[: len(word) - len(word.lstrip())]


def _make_message(words: list[str], window: _Window) -> Message:
    read = "".join(words[window.begin : window.trained])
    # Blank space before a text is what formats take away: a window that reads on begins without.
    read = read.lstrip()
    content = read + "".join(words[window.trained : window.end])
    return Message("assistant", content, len(read), window.end < len(words))
