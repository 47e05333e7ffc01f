"""`chaccu judge run` as a process, killed again and again: nothing is asked twice but what was under way, nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from chaccu.artifact import read_manifest, verify_files
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.processes import start_command, wait_until

_QUESTIONS = 20
_AT_ONCE = 3
_MODELS = ("base", "tuned")
_KILLS = 3
_TURNS = 2 * _QUESTIONS * len(_MODELS)


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def kill_after(command: list[str], answers: Path, wanted: int) -> int:
    """Start the command, SIGKILL it once the file has `wanted` answers; how many are there then."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + 60
        while lines_of(answers) < wanted:
            assert time.monotonic() < deadline_s
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    return lines_of(answers)


def test_a_run_that_is_killed_again_and_again_asks_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    lines = [{"question_id": number, "turns": [f"Question {number}?", "And then?"]} for number in range(_QUESTIONS)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    answers = out / "answers.jsonl"
    with FakeOpenAI({name: FakeModel(answer="One two three.", delay_s=0.02) for name in _MODELS}) as server:
        command = [sys.executable, "-m", "chaccu.cli.main", "judge", "run", "--url", server.url, "--questions", str(questions)]
        command += ["--model", "base", "--model", "tuned", "--out", str(out), "--at-once", str(_AT_ONCE)]
        kept = 0
        for _ in range(_KILLS):
            kept = kill_after(command, answers, kept + 7)
        assert kept < _TURNS
        last = subprocess.run([*command, "--json"], capture_output=True, check=True, text=True)
    counts = json.loads(last.stdout)
    assert (counts["asked"], counts["answered"], counts["failed"], counts["reused"]) == (_TURNS, _TURNS, 0, kept)
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    places = Counter((one["model"], one["question_id"], one["turn"]) for one in written)
    assert len(places) == len(written) == _TURNS
    assert {one["text"] for one in written} == {"One two three."}
    # Beyond one request a turn, only what was under way at a kill was sent again.
    requests = Counter(json.dumps([body["model"], body["messages"]]) for body in server.requests)
    assert len(requests) == _TURNS
    assert sum(requests.values()) <= _TURNS + _KILLS * _AT_ONCE * len(_MODELS)
    verify_files(out, read_manifest(out, kind="answers").files)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    answers = tmp_path / "out" / "answers.jsonl"
    with FakeOpenAI({"base": FakeModel(answer="One two three.", delay_s=0.05)}) as server:
        arguments = ["judge", "run", "--url", server.url, "--model", "base", "--out", str(tmp_path / "out"), "--at-once", "1"]
        with start_command(tmp_path / "logs", arguments) as service:
            wait_until(lambda: lines_of(answers) >= 3, service)
            service.signal(signal.SIGINT)
            assert service.wait(20) == 130
        assert f"what was answered until now is in {tmp_path / 'out'}; run the same" in " ".join(service.log.split())
        assert "Traceback" not in service.log
        had = lines_of(answers)
        with start_command(tmp_path / "logs", arguments) as service:
            assert service.wait(60) == 0
        assert f"12 answered, {had} of them on file already" in " ".join(service.log.split())
