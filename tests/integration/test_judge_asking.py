"""A judging run as a real process: killed and stopped in the middle, it goes on, and no question is asked twice."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from chaccu.judge.verdicts import read_verdicts
from chaccu.testing.answers import build_answer
from chaccu.testing.processes import Service, start_command, wait_until
from chaccu.testing.scripted_judge import Reply, ScriptedJudge

QUESTIONS, AT_ONCE = 40, 4


@pytest.fixture
def server() -> Iterator[ScriptedJudge]:
    with ScriptedJudge(lambda body, number: Reply(text="[[A]]", model="judge-1", delay_s=0.03)) as one:
        yield one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [{"question_id": number, "category": "x", "turns": [f"Question {number}?"]} for number in range(QUESTIONS)]
    (tmp_path / "q.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    answers = [
        build_answer(number, model, f"{model} on {number}") for model in ("base", "tuned") for number in range(QUESTIONS)
    ]
    (tmp_path / "answers.jsonl").write_bytes(b"".join(msgspec.json.encode(answer) + b"\n" for answer in answers))
    return tmp_path


def start(folder: Path, server: ScriptedJudge) -> Service:
    arguments = ["judge", "compare", str(folder / "answers.jsonl"), "--judge", "judge", "--url", server.url]
    arguments += ["--questions", str(folder / "q.jsonl"), "--out", str(folder / "out"), "--at-once", str(AT_ONCE)]
    return start_command(folder / "logs", arguments)


def lines(folder: Path) -> list[bytes]:
    file = folder / "out" / "verdicts.jsonl"
    return file.read_bytes().splitlines() if file.exists() else []


def test_killed_twice_it_asks_nothing_twice_and_loses_nothing(server: ScriptedJudge, folder: Path) -> None:
    kept: set[bytes] = set()
    for at_least in (15, 45):
        with start(folder, server) as service:
            wait_until(lambda at_least=at_least: len(lines(folder)) >= at_least, service)  # type: ignore[misc]
            service.kill()
        assert not (folder / "out" / "manifest.json").exists()
        whole = [line for line in lines(folder) if line.endswith(b"}")]
        assert kept <= set(whole)
        kept = set(whole)
        # A kill within a write leaves half of a line.
        with (folder / "out" / "verdicts.jsonl").open("ab") as file:
            file.write(whole[0][: len(whole[0]) // 2])
    with start(folder, server) as service:
        assert service.wait(60) == 0, service.log
    verdicts = read_verdicts(folder / "out" / "verdicts.jsonl")
    assert Counter((one.question_id, one.models) for one in verdicts) == {
        (number, models): 1 for number in range(QUESTIONS) for models in (("base", "tuned"), ("tuned", "base"))
    }
    assert kept <= set(lines(folder))
    # Those under way at each of the two kills may have been asked again, and no others.
    assert sum(count - 1 for count in server.counts.values()) <= 2 * AT_ONCE
    assert len(server.counts) == 2 * QUESTIONS
    asked = len(server.bodies)
    with start(folder, server) as service:
        assert service.wait(60) == 0
    assert len(server.bodies) == asked


def test_ctrl_c_says_how_to_go_on(server: ScriptedJudge, folder: Path) -> None:
    with start(folder, server) as service:
        wait_until(lambda: len(lines(folder)) >= 5, service)
        service.signal(signal.SIGINT)
        assert service.wait(20) == 130
        assert f"what was said until now is in {folder / 'out'}; run the same command again" in " ".join(service.log.split())
        assert "Traceback" not in service.log
    had = len(lines(folder))
    with start(folder, server) as service:
        assert service.wait(60) == 0, service.log
    assert f"{had} of them on file" in " ".join(service.log.split())
    assert len(read_verdicts(folder / "out" / "verdicts.jsonl")) == 2 * QUESTIONS


def test_a_second_run_on_the_folder_is_refused_and_harms_nothing(server: ScriptedJudge, folder: Path) -> None:
    with start(folder, server) as first:
        wait_until(lambda: len(lines(folder)) >= 5, first)
        with start(folder, server) as second:
            assert second.wait(60) == 1
            assert "another run writes to" in second.log
        assert first.wait(60) == 0, first.log
    assert len(read_verdicts(folder / "out" / "verdicts.jsonl")) == 2 * QUESTIONS
    assert set(server.counts.values()) == {1}
