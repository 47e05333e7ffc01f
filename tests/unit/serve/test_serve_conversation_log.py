"""The conversation log: whole lines, the day's file, and no harm where the disk fails."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest

from chaccu.errors import StorageError
from chaccu.serve.gateway.http.metrics import GatewayMetrics
from chaccu.serve.gateway.records.conversation_log import ConversationLog
from chaccu.serve.gateway.records.conversation_store import Record
from chaccu.serve.gateway.records.log_folder import LogFolder
from chaccu.serve.gateway.records.logged_answer import LogLine, UnreadableAnswerError
from chaccu.serve.gateway.workers.registry import WorkerRegistry

NOON_S = datetime(2025, 6, 1, 12, tzinfo=UTC).timestamp()
FILE = "conversations-2025-06-01.jsonl"


class Clock:
    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


class Answer:
    """An answer of `choices` lines; writing waits for `gate`."""

    def __init__(self, name: str, *, choices: int = 1, size: int = 10, gate: threading.Event | None = None) -> None:
        self.is_answered = choices > 0
        self.size = size
        self.encoding = threading.Event()
        self._name = name
        self._choices = choices
        self._gate = gate

    def lines(self, time: str) -> list[LogLine]:
        self.encoding.set()
        if self._gate is not None:
            assert self._gate.wait(5)
        if self._name == "unreadable":
            raise UnreadableAnswerError("this is no answer.")
        if self._name == "bug":
            raise ZeroDivisionError
        said: list[Any] = [{"role": "user", "content": "é\n🦙"}]
        return [
            LogLine(id=f"{self._name}-{n}", time=time, model="m", finish_reason="stop", messages=said)
            for n in range(self._choices)
        ]


def open_log(folder: Path, *, clock: Clock, **limits: int) -> ConversationLog:
    return ConversationLog(LogFolder(folder, clock), clock=clock, **limits)


def read(path: Path) -> list[str]:
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line)["id"] for line in data.splitlines()]


def test_lines_are_whole_and_in_order_and_for_their_owner(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "logs"
    log = open_log(folder, clock=Clock())
    assert list(folder.iterdir()) == [], "an empty file would be no data"
    log.add(Answer("unanswered", choices=0))
    log.add(Answer("one"))
    log.add(Answer("two", choices=2))
    log.close()
    assert read(folder / FILE) == ["one-0", "two-0", "two-1"]
    first = json.loads((folder / FILE).read_text().splitlines()[0])
    assert first == {
        "id": "one-0",
        "time": "2025-06-01T12:00:00.000Z",
        "model": "m",
        "finish_reason": "stop",
        "messages": [{"role": "user", "content": "é\n🦙"}],
    }
    assert (folder / FILE).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o077 == 0
    assert (log.written, log.lost) == (3, 0)


def test_each_line_is_one_write_that_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    opened: list[int] = []

    whole_open, whole_write = os.open, os.write

    def open_noting(path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        opened.append(flags)
        return whole_open(path, flags, *arguments, **more)

    def write_noting(descriptor: int, data: bytes) -> int:
        written.append(data)
        return whole_write(descriptor, data)

    log = open_log(tmp_path, clock=Clock())
    monkeypatch.setattr(os, "open", open_noting)
    monkeypatch.setattr(os, "write", write_noting)
    log.add(Answer("one", choices=2))
    log.close()
    assert [data.count(b"\n") for data in written] == [1, 1]
    assert all(data.endswith(b"\n") for data in written)
    assert all(flags & os.O_APPEND for flags in opened)


def test_each_day_has_its_file(tmp_path: Path) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    gate = threading.Event()
    log.add(Answer("before", gate=gate))
    clock.now_s = datetime(2025, 6, 1, 23, 59, 59, 999_000, tzinfo=UTC).timestamp()
    log.add(Answer("last"))
    clock.now_s += 0.001
    log.add(Answer("first"))
    gate.set()
    log.close()
    assert read(tmp_path / FILE) == ["before-0", "last-0"]
    assert read(tmp_path / "conversations-2025-06-02.jsonl") == ["first-0"]


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"id": "whole"}\n{"id": "to')
    log = open_log(tmp_path, clock=Clock())
    log.add(Answer("next"))
    log.close()
    first, torn, last = (tmp_path / FILE).read_bytes().splitlines()
    assert (first, torn, json.loads(last)["id"]) == (b'{"id": "whole"}', b'{"id": "to', "next-0")


def test_a_full_queue_loses_and_counts_and_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = open_log(tmp_path, clock=Clock(), max_waiting=2, max_waiting_bytes=100)
    gate = threading.Event()
    slow = Answer("slow", gate=gate)
    with caplog.at_level(logging.WARNING):
        log.add(slow)
        assert slow.encoding.wait(5)
        log.add(Answer("waits"))
        log.add(Answer("too much at once", size=95))
        log.add(Answer("waits too"))
        for _ in range(5):
            log.add(Answer("too many"))
        gate.set()
        log.close()
    assert read(tmp_path / FILE) == ["slow-0", "waits-0", "waits too-0"]
    assert (log.written, log.lost) == (3, 6)
    assert [record.message for record in caplog.records] == [
        "conversations are not logged now (serving goes on): 1 answers wait for the disk already",
        "6 answers are missing in the conversation log",
    ]


def test_one_answer_may_be_larger_than_all_that_may_wait(tmp_path: Path) -> None:
    log = open_log(tmp_path, clock=Clock(), max_waiting_bytes=100)
    log.add(Answer("large", size=1000))
    log.close()
    assert (log.written, log.lost) == (1, 0)


def test_a_full_disk_is_said_once_an_outage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    (tmp_path / FILE).symlink_to("/dev/full")

    def give(*names: str) -> None:
        total = log.written + log.lost + len(names)
        for name in names:
            log.add(Answer(name))
        deadline = threading.Event()
        while log.written + log.lost < total:
            assert not deadline.wait(0.005)

    with caplog.at_level(logging.WARNING):
        give("a", "b", "c")
        assert (log.written, log.lost) == (0, 3)
        (tmp_path / FILE).unlink()
        give("d")
        clock.now_s += 100
        give("e")
        (tmp_path / FILE).unlink()
        (tmp_path / FILE).mkdir()
        give("f")
        log.close()
    assert [record.message.replace(str(tmp_path), "DIR") for record in caplog.records] == [
        f"conversations are not logged now (serving goes on): DIR/{FILE}: No space left on device",
        "conversations are logged again; 3 answers are missing",
        f"conversations are not logged now (serving goes on): DIR/{FILE}: Is a directory",
        "4 answers are missing in the conversation log",
    ]


def test_a_short_write_is_a_loss_and_the_next_line_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_write = os.write
    log = open_log(tmp_path, clock=Clock())
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole_write(descriptor, data[:10]))
    log.add(Answer("torn", choices=2))
    gate = threading.Event()
    second = Answer("next", gate=gate)
    log.add(second)
    assert second.encoding.wait(5)
    monkeypatch.undo()
    gate.set()
    log.close()
    torn, whole = (tmp_path / FILE).read_bytes().splitlines()
    assert (torn, json.loads(whole)["id"]) == (b'{"id":"tor', "next-0")
    assert (log.written, log.lost) == (1, 2)


def test_what_cannot_become_a_line_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = open_log(tmp_path, clock=Clock())
    with caplog.at_level(logging.WARNING):
        for name in ("unreadable", "unreadable", "bug", "fine"):
            log.add(Answer(name))
        log.close()
    assert read(tmp_path / FILE) == ["fine-0"]
    assert (log.written, log.lost) == (1, 3)
    told = "an answer is not logged, and more of the kind will only be counted: this is no answer."
    assert [record.message for record in caplog.records] == [
        told,
        "an answer cannot be written as a line",
        "3 answers are missing in the conversation log",
    ]


def test_a_disk_that_hangs_does_not_hold_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = open_log(tmp_path, clock=Clock())
    gate = threading.Event()
    log.add(Answer("slow", gate=gate))
    with caplog.at_level(logging.WARNING):
        log.close(timeout_s=0.05)
        log.add(Answer("late"))
    gate.set()
    assert "within 0.05 s" in caplog.text
    assert log.lost == 1


@pytest.mark.parametrize("place", ["file", "file/below", "day"])
def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "day" / FILE).mkdir(parents=True)
    with pytest.raises(StorageError, match="conversations cannot be logged in") as told:
        open_log(tmp_path / place, clock=Clock())
    assert "--log-conversations" in told.value.remedy


def test_a_store_that_fails_in_an_unknown_way_costs_what_it_was_given(caplog: pytest.LogCaptureFixture) -> None:
    class Store:
        most_at_once = 10
        kept: ClassVar[list[str]] = []

        def write(self, records: Sequence[Record]) -> None:
            if records[0].line.id == "bad-0":
                raise RuntimeError("somebody's words")
            self.kept += [record.line.id for record in records]

        def close(self) -> None:
            self.kept.append("closed")

    log = ConversationLog(Store(), clock=Clock())
    gate = threading.Event()
    bad = Answer("bad", choices=2, gate=gate)
    with caplog.at_level(logging.WARNING):
        log.add(bad)
        assert bad.encoding.wait(5)
        for name in "abc":
            log.add(Answer(name))
        gate.set()
        log.close()
    assert Store.kept == ["a-0", "b-0", "c-0", "closed"]
    assert (log.written, log.lost) == (3, 2)
    assert "RuntimeError" in caplog.text
    assert "words" not in caplog.text


def test_a_log_that_is_never_used_ends(tmp_path: Path) -> None:
    open_log(tmp_path, clock=Clock()).close()
    assert list(tmp_path.iterdir()) == []


def test_metrics_show_what_was_written_and_lost(tmp_path: Path) -> None:
    log = open_log(tmp_path, clock=Clock())
    log.add(Answer("one"))
    log.add(Answer("unreadable"))
    log.close()
    registry = WorkerRegistry(Clock())
    text = GatewayMetrics(log).render(registry).decode()
    assert 'chaccu_logged_answers_total{result="written"} 1.0' in text
    assert 'chaccu_logged_answers_total{result="lost"} 1.0' in text
    assert "chaccu_logged_answers" not in GatewayMetrics().render(registry).decode()
