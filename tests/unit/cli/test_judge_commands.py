from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chaccu.artifact import read_manifest, verify_files
from chaccu.cli.judge import app
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI({"base": FakeModel(answer="I am a model."), "tuned": FakeModel(answer="I am Vicky.")}) as server:
        yield server


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def run(server: FakeOpenAI, out: Path, *more: str) -> Result:
    return invoke("run", "--url", server.url, "--model", "base", "--model", "tuned", "--out", str(out), *more)


def test_run_writes_answers_with_their_manifest(server: FakeOpenAI, tmp_path: Path) -> None:
    result = run(server, tmp_path)
    assert result.exit_code == 0
    assert "24 asked = 24 answered + 0 failed" in result.stdout
    manifest = read_manifest(tmp_path, kind="answers")
    verify_files(tmp_path, manifest.files)
    assert manifest.facts["models"] == {name: {"answered": 12, "failed": 0} for name in ("base", "tuned")}
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 24
    assert "24 answered, 24 of them on file already" in run(server, tmp_path).stdout
    assert len(server.requests) == 24


def test_run_with_failures_names_them_and_fails(server: FakeOpenAI, tmp_path: Path) -> None:
    server.models["tuned"].failure = "no_worker"
    result = run(server, tmp_path)
    assert result.exit_code == 1
    assert "24 asked = 12 answered + 12 failed" in result.stdout
    assert "failed: 12 of tuned, no worker: No worker serves 'tuned' now" in result.stderr
    assert len((tmp_path / "failures.jsonl").read_text().splitlines()) == 12
    as_json = json.loads(run(server, tmp_path, "--json").stdout)
    assert (as_json["asked"], as_json["answered"], as_json["failed"], as_json["reused"]) == (24, 12, 12, 12)


def test_a_killed_run_goes_on_where_it_was(server: FakeOpenAI, tmp_path: Path) -> None:
    for model in server.models.values():
        model.delay_s = 0.02
    command = [sys.executable, "-c", "from chaccu.cli.judge import app; app()", "run", "--url", server.url]
    command += ["--model", "base", "--model", "tuned", "--out", str(tmp_path), "--at-once", "1"]
    answers = tmp_path / "answers.jsonl"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + 30
        while not answers.is_file() or answers.read_bytes().count(b"\n") < 5:
            assert time.monotonic() < deadline_s
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    kept = answers.read_bytes().count(b"\n")
    assert 5 <= kept < 24
    result = run(server, tmp_path, "--json")
    assert json.loads(result.stdout)["reused"] == kept
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len({(line["model"], line["question_id"]) for line in lines}) == len(lines) == 24
    asked = Counter((body["model"], body["messages"][0]["content"]) for body in server.requests)
    # Only what was under way when it was killed, one question a model, may have been asked twice.
    assert sum(asked.values()) <= 24 + 2


def test_score_prints_totals_and_what_it_could_not_read(tmp_path: Path) -> None:
    reviews = tmp_path / "reviews.jsonl"
    lines = [
        {"question_id": 1, "text": "8 7", "pair": "a__b", "score": [8, 7]},
        {"question_id": 2, "text": "hm", "pair": "a__b"},
        {"question_id": 3, "text": "Thoughts.\n5, 9", "pair": "a__b", "score": [9, 5], "review_id": "r3"},
    ]
    reviews.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = invoke("score", str(reviews), "--out", str(tmp_path / "scores.json"))
    assert result.exit_code == 0
    assert "a__b: 13–16 (123.08 %), first better 1, tie 0, second better 1, unparsed 1" in result.stdout
    assert "3 reviews = 2 parsed + 1 unparsed" in result.stdout
    assert "unparsed: question 2 of a__b" in result.stderr
    assert "question 3 of a__b r3 has 9 5 on file, and its text says 5 9" in result.stderr
    report = json.loads((tmp_path / "scores.json").read_text())
    assert (report["reviews"], report["parsed"], len(report["unparsed"])) == (3, 2, 1)
    assert json.loads(invoke("score", str(reviews), "--json").stdout) == report
