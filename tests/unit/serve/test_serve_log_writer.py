"""What a log's lines say, and that nobody waits for them."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import msgspec

from chaccu.serve.log_writer import LogWriter


class Line(msgspec.Struct, omit_defaults=True):
    request_id: str
    path: str
    seconds: float
    key: str | None = None


def test_lines_are_json_or_text(tmp_path: Path) -> None:
    told = {}
    for log_format in ("json", "text"):
        file = tmp_path / log_format
        with file.open("wb") as out, LogWriter(log_format, "info", descriptor=out.fileno()) as lines:
            lines.say("gateway ready")
            lines.tell(logging.INFO, "request", Line("r1", '/a b\n"c"', 0.5))
            lines.tell(logging.DEBUG, "request", Line("r2", "/health", 0.5))
            logging.getLogger("chaccu.some.module").warning("the disk is %s", "full\nor so")
            try:
                raise ValueError("odd")
            except ValueError:
                logging.getLogger("uvicorn.error").exception("a crash")
        told[log_format] = file.read_text().splitlines()
    said, request, warned, crashed = map(json.loads, told["json"])
    assert said["message"] == "gateway ready"
    assert {**request, "time": ""} == {
        "time": "",
        "level": "info",
        "message": "request",
        "request_id": "r1",
        "path": '/a b\n"c"',
        "seconds": 0.5,
    }
    assert (warned["level"], warned["message"], warned["logger"]) == (
        "warning",
        "the disk is full\nor so",
        "chaccu.some.module",
    )
    assert crashed["exception"].endswith("ValueError: odd\n")
    said_text, request_text, *others = told["text"]
    assert said_text == "gateway ready"
    assert request_text.endswith(r' info request request_id=r1 path="/a b\n\"c\"" seconds=0.5')
    assert others[0].endswith("warning the disk is full")
    assert all(line.startswith("    ") or line.endswith("error a crash") for line in others[1:])


def test_the_level_is_kept_and_the_root_logger_left_as_it_was(tmp_path: Path) -> None:
    before = (logging.getLogger().level, list(logging.getLogger().handlers))
    with (tmp_path / "log").open("wb") as out, LogWriter("text", "error", descriptor=out.fileno()) as lines:
        logging.getLogger("chaccu").warning("not told")
        lines.tell(logging.WARNING, "request", Line("r1", "/", 1))
        lines.say("told")
    assert (tmp_path / "log").read_text() == "told\n"
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == before


def test_a_reader_that_does_not_read_holds_nobody_up() -> None:
    reading_end, writing_end = os.pipe()
    with LogWriter("text", "info", descriptor=writing_end) as lines:
        began_s = time.monotonic()
        for number in range(30_000):
            lines.tell(logging.INFO, "request", Line(f"r{number}", "/" + "x" * 100, 1))
        assert time.monotonic() - began_s < 2
        assert lines.dropped > 5_000
        # The pipe breaks under the thread that writes, and the block still ends.
        os.close(reading_end)
    os.close(writing_end)


def test_an_entry_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as out, LogWriter("json", "info", descriptor=out.fileno()) as lines:
        lines.tell(logging.INFO, "request", Line("a lone \ud800", "/", 1))
        lines.say("told")
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert first["message"] == "a log line cannot be written: UnicodeEncodeError"
    assert second["message"] == "told"
