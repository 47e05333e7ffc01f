"""A worker's lines about its requests, by their pieces."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from chaccu.serve.link import Embed, End, Failure, Generate, Piece, Sampling
from chaccu.serve.worker.work_log import WorkLog, open_work_log


class Lines:
    """What a log is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Any]] = []

    def tell(self, level: int, message: str, fields: Any) -> None:
        self.told.append((level, fields))


def begun(clock: Any = lambda: 0.0) -> tuple[WorkLog, Lines]:
    lines = Lines()
    log = WorkLog(lines, None, "w", clock)  # type: ignore[arg-type]
    log.begin(Generate(request=1, model="m", sampling=Sampling(), prompt="hi", request_id="r"))
    return log, lines


def test_a_line_adds_up_the_pieces() -> None:
    times = iter([0.0, 1.5, 4.0])
    log, lines = begun(lambda: next(times))
    log.take(Piece(1, "", 1, 7))
    log.take(Piece(1, "a", 2, 7))
    log.take(Piece(1, "b", 3, 7, "length"))
    ((level, line),) = lines.told
    assert (level, line.request_id, line.end) == (logging.INFO, "r", "length")
    assert (line.prompt_tokens, line.completion_tokens) == (7, 6)
    assert (line.first_text_seconds, line.seconds) == (1.5, 4.0)


@pytest.mark.parametrize(
    ("end", "failure", "told", "level"),
    [
        ("cancelled", None, "cancelled", logging.INFO),
        ("failed", Failure(kind="context_overflow", message=""), "context_overflow", logging.INFO),
        ("failed", Failure(kind="engine_failed", message=""), "engine_failed", logging.WARNING),
    ],
)
def test_the_end_is_told_by_its_kind(end: End, failure: Failure | None, told: str, level: int) -> None:
    log, lines = begun()
    log.take(Piece(1, end=end, failure=failure))
    assert [(level, line.end) for level, line in lines.told] == [(level, told)]


def test_what_an_engine_lost_has_its_line_too() -> None:
    log, lines = begun()
    log.begin(Embed(request=2, model="m", inputs=["x"], request_id="s"))
    log.take(Piece(1, end="stop"))
    log.close()
    log.close()
    assert [(level, line.request_id, line.end) for level, line in lines.told] == [
        (logging.INFO, "r", "stop"),
        (logging.WARNING, "s", "lost"),
    ]


def test_nobody_wants_to_know() -> None:
    assert open_work_log(None, None, "w") is None
