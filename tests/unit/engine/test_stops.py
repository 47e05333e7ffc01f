from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaccu.engine.stops import StopScanner

TEXT = st.text("ab<|>", max_size=30)


@given(pieces=st.lists(TEXT, max_size=8), stops=st.lists(st.text("ab<|>", min_size=1, max_size=5), max_size=3))
def test_released_text_is_the_text_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    released, ended = "", False
    for piece in pieces:
        text, ended = scanner.push(piece)
        released += text
        if ended:
            break
    if not ended:
        released += scanner.flush()
    for stop in stops:
        assert stop not in released
    assert "".join(pieces).startswith(released)
    assert ended == any(stop in "".join(pieces) for stop in stops)
    assert (scanner.stopped_by in stops) if ended else (scanner.stopped_by is None)
    assert "".join(pieces).startswith(released + (scanner.stopped_by or ""))


def test_what_cannot_be_a_stop_string_is_released_at_once() -> None:
    scanner = StopScanner(["<end>"])
    assert scanner.push("hello <e") == ("hello ", False)
    assert scanner.push("x") == ("<ex", False)
    assert scanner.push(" <end") == (" ", False)
    assert scanner.push("> more") == ("", True)


@pytest.mark.parametrize("stops", [[], [""]])
def test_no_stop_strings_hold_nothing_back(stops: list[str]) -> None:
    assert StopScanner(stops).push("a") == ("a", False)
