from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chaccu.artifact import Manifest, read_manifest, verify_files, write_manifest
from chaccu.cli.judge import app
from chaccu.errors import ArtifactError, DataError, StorageError
from chaccu.file_lock import lock_folder
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.scripted_judge import Reply, ScriptedJudge


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
    assert manifest.facts["models"] == {
        name: {"answered": 12, "failed": 0, "empty": 0, "cut_off": 0} for name in ("base", "tuned")
    }
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 24
    assert "24 answered, 24 of them on file already" in run(server, tmp_path).stdout
    assert len(server.requests) == 24


def test_run_with_failures_names_them_and_fails(server: FakeOpenAI, tmp_path: Path) -> None:
    server.models["tuned"].failure = "no_worker"
    result = run(server, tmp_path, "--retries", "0")
    assert result.exit_code == 1
    assert "24 asked = 12 answered + 12 failed" in result.stdout
    assert "failed: 12 of tuned, no worker: No worker serves 'tuned' now" in result.stderr
    assert len((tmp_path / "failures.jsonl").read_text().splitlines()) == 12
    as_json = json.loads(run(server, tmp_path, "--json", "--retries", "0").stdout)
    assert (as_json["asked"], as_json["answered"], as_json["failed"], as_json["reused"]) == (24, 12, 12, 12)


def test_several_sets_of_several_servers(server: FakeOpenAI, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"question_id": "m", "category": "writing", "text": "A line?"}\n')
    with FakeOpenAI({"far": FakeModel(answer="From afar.")}) as other:
        result = invoke(
            *("run", "--model", f"base={server.url}", "--model", f"far={other.url}", "--questions", "starter"),
            *("--questions", str(mine), "--out", str(tmp_path / "out")),
        )
        assert (len(other.requests), len(server.requests)) == (13, 13)
        asked = {body["messages"][0]["content"]: body["temperature"] for body in other.requests}
    assert result.exit_code == 0, result.output
    assert (asked["A line?"], asked["I have 24 apples and give a third of them away. How many are left?"]) == (0.7, 0.0)
    settings = read_manifest(tmp_path / "out").settings
    assert settings["question_set_versions"] == {"starter": 1}
    assert (settings["questions"], settings["models"]) == (["starter", str(mine)], ["base", "far"])


def test_a_key_is_read_from_the_variable_that_is_named(
    server: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", "far-key")
    with FakeOpenAI({"far": FakeModel()}) as other:
        invoke(
            *("run", "--url", server.url, "--model", "base", "--model", f"far={other.url},key-env=FAR_KEY"),
            *("--api-key", "near-key", "--out", str(tmp_path)),
        )
        assert {one["authorization"] for one in other.request_headers} == {"Bearer far-key"}
    assert {one["authorization"] for one in server.request_headers} == {"Bearer near-key"}


def test_questions_lists_the_sets_with_their_categories() -> None:
    printed = invoke("questions").stdout
    assert "chaccu-100, version 2: 100 questions" in printed
    assert json.loads(invoke("questions", "--json").stdout)["starter"]["math"] == 2


def test_check_tells_models_apart_without_a_judge(server: FakeOpenAI, tmp_path: Path) -> None:
    server.models["tuned"].answer = "7"
    run(server, tmp_path, "--questions", "checked")
    result = invoke("check", str(tmp_path))
    assert result.exit_code == 0
    assert "4 unchecked" in result.stdout
    checks = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    assert len(checks) == 2 * 68
    passed = {(one["model"], one["question_id"]) for one in checks if one["outcome"] == "passed"}
    assert ("tuned", "checked-arithmetic-1") in passed
    assert ("base", "checked-arithmetic-1") not in passed
    counts = json.loads(invoke("check", str(tmp_path), "--json").stdout)["counts"]
    whole = next(one for one in counts if (one["model"], one["category"]) == ("tuned", "all"))
    assert whole["passed"] + whole["failed"] + whole["unchecked"] + whole["missing"] == 68
    assert whole["interval"][0] < whole["share"] < whole["interval"][1]


def test_check_counts_the_models_of_earlier_runs_too(server: FakeOpenAI, tmp_path: Path) -> None:
    for model in ("base", "tuned"):
        invoke("run", "--url", server.url, "--model", model, "--questions", "checked", "--out", str(tmp_path))
    counts = json.loads(invoke("check", str(tmp_path), "--json").stdout)["counts"]
    assert [one["model"] for one in counts if one["category"] == "all"] == ["tuned", "base"]
    assert {one["missing"] for one in counts} == {0}


def test_check_says_that_the_questions_have_changed(server: FakeOpenAI, tmp_path: Path) -> None:
    file, out = tmp_path / "q.jsonl", tmp_path / "out"
    question = {"question_id": 1, "text": "What is 3 + 4?", "checks": [{"kind": "number", "value": 7}]}
    file.write_text(json.dumps(question))
    run(server, out, "--questions", str(file))
    assert "has changed" not in invoke("check", str(out)).stderr
    file.write_text(json.dumps(question | {"text": "What is 5 + 2?"}))
    assert "q.jsonl has changed since" in invoke("check", str(out)).stderr
    run(server, out, "--questions", str(file))
    assert "has changed" not in invoke("check", str(out)).stderr


def test_check_needs_questions_with_rules(server: FakeOpenAI, tmp_path: Path) -> None:
    run(server, tmp_path)
    with pytest.raises(DataError, match="no question of starter has rules"):
        invoke("check", str(tmp_path))


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


def test_two_runs_do_not_write_to_one_folder(server: FakeOpenAI, tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(StorageError, match="another run writes to"):
        run(server, tmp_path)
    assert server.requests == []


def test_answers_that_say_nothing_or_were_cut_off_are_told(server: FakeOpenAI, tmp_path: Path) -> None:
    server.models["tuned"].answer = ""
    assert "tuned  12 answered (12 empty), 0 failed" in run(server, tmp_path / "a").stdout
    with ScriptedJudge(lambda body, number: Reply(text="So", finish_reason="length")) as other:
        result = invoke("run", "--url", other.url, "--model", "short", "--out", str(tmp_path / "b"))
    assert "short  12 answered (12 cut off), 0 failed" in result.stdout
    assert read_manifest(tmp_path / "b").facts["models"]["short"]["cut_off"] == 12


def test_answers_are_not_written_over_verdicts(server: FakeOpenAI, tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(kind="verdicts", name="v"))
    with pytest.raises(ArtifactError, match="expected 'answers'"):
        run(server, tmp_path)
    assert server.requests == []
