from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from chaccu.artifact import Manifest, read_manifest, sha256_json, verify_files, write_manifest
from chaccu.cli.judge import app
from chaccu.errors import StorageError, UsageError
from chaccu.file_lock import lock_folder
from chaccu.judge import load_questions
from chaccu.judge.asking import JudgeChangedError
from chaccu.judge.verdicts import read_verdicts
from chaccu.testing.answers import build_answer
from chaccu.testing.scripted_judge import Reply, ScriptedJudge

QUESTIONS = [
    {"question_id": 1, "category": "knowledge", "turns": ["What is a vicuña?"]},
    {"question_id": 2, "category": "writing", "turns": ["Write a line.", "Shorter."]},
]


@pytest.fixture
def server() -> Iterator[ScriptedJudge]:
    with ScriptedJudge(
        lambda body, number: Reply(text="So it is. [[A]]" if "B" in body["messages"][0]["content"] else "[[8]]")
    ) as one:
        yield one


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """A folder of answers of two models, with the questions beside it."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    lines = [
        build_answer(question["question_id"], model, f"{model} {turn} {question['question_id']}", turn=turn)  # type: ignore[arg-type]
        for model in ("base", "tuned")
        for question in QUESTIONS
        for turn in range(len(question["turns"]))  # type: ignore[arg-type]
    ]
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "answers.jsonl").write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in lines))
    return tmp_path / "answers"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def judge(command: str, answers: Path, server: ScriptedJudge, *more: str | Path) -> Result:
    questions = answers.parent / "q.jsonl"
    out = answers.parent / "out"
    return invoke(command, answers, "--judge", "gpt", "--url", server.url, "--out", out, "--questions", questions, *more)


def test_compare_writes_verdicts_of_both_orders_with_their_manifest(server: ScriptedJudge, answers: Path) -> None:
    result = judge("compare", answers, server, "--price-in", "1", "--price-out", "10")
    assert result.exit_code == 0, result.stderr
    assert "gpt: 6 parsed, 0 unparsed, 0 without a verdict; 600 tokens read, 60 written, 0.0012 USD" in result.stdout
    assert (
        "6 asked = 6 parsed + 0 unparsed + 0 failed + 0 over budget, 0 of them known before; this run cost 0.0012"
        in result.stdout
    )
    assert "6 to judge, 0 of them on file; 6 requests to send, at most" in result.stderr
    out = answers.parent / "out"
    manifest = read_manifest(out, kind="verdicts")
    verify_files(out, manifest.files)
    assert manifest.settings["judges"] == [{"name": "gpt", "url": f"{server.url}/v1"}]
    assert set(manifest.files) == {"verdicts.jsonl", "failures.jsonl", "canaries.jsonl"}
    assert {"questions", f"answers {answers}"} == manifest.inputs.keys()
    assert {one.models for one in read_verdicts(out / "verdicts.jsonl")} == {("base", "tuned"), ("tuned", "base")}
    again = judge("compare", answers, server, "--json")
    facts = json.loads(again.stdout)
    assert (facts["asked"], facts["parsed"], facts["reused"], len(server.bodies)) == (6, 6, 6, 6)


def test_one_order_of_a_baseline_for_whole_conversations(server: ScriptedJudge, answers: Path) -> None:
    result = judge("compare", answers, server, "--one-order", "--baseline", "tuned", "--by", "conversation")
    assert result.exit_code == 0
    verdicts = read_verdicts(answers.parent / "out" / "verdicts.jsonl")
    assert [(one.models, one.turn) for one in verdicts] == [(("tuned", "base"), None)] * 2


def test_grade_with_an_ensemble_and_a_rubric(server: ScriptedJudge, answers: Path) -> None:
    server.script = lambda body, number: Reply(text="[[8]]")
    (answers.parent / "criteria.txt").write_text("- It is short.\n")
    more = ["--judge", f"llama={server.url}", "--prompt", "rubric", "--criteria", answers.parent / "criteria.txt"]
    result = judge("grade", answers, server, *more)
    assert result.exit_code == 0, result.stderr
    verdicts = read_verdicts(answers.parent / "out" / "verdicts.jsonl")
    assert {(one.judge, one.scores) for one in verdicts} == {("gpt", (8.0,)), ("llama", (8.0,))}
    assert len(verdicts) == 12
    assert all("It is short." in body["messages"][1]["content"] for body in server.bodies)


def test_an_estimate_asks_nothing(server: ScriptedJudge, answers: Path) -> None:
    result = judge("compare", answers, server, "--estimate", "--price-in", "2.5", "--price-out", "10")
    assert result.exit_code == 0
    assert "gpt: 6 requests, about " in result.stdout
    assert "tokens to read (bytes / 4), at most 6,144 to write, at most 0.0" in result.stdout
    assert server.bodies == []
    as_json = json.loads(judge("compare", answers, server, "--estimate", "--json").stdout)
    assert (as_json["counted_by"], as_json["judges"][0]["requests"]) == ("bytes / 4", 6)


def test_the_cap_ends_with_what_is_left(server: ScriptedJudge, answers: Path) -> None:
    more = ["--price-in", "0", "--price-out", "1000", "--max-tokens", "20", "--max-cost", "0.035", "--at-once", "1"]
    result = judge("compare", answers, server, *more)
    assert result.exit_code == 1
    assert "6 asked = 2 parsed + 0 unparsed + 0 failed + 4 over budget" in result.stdout
    assert "4 of gpt, over budget: it does not fit under the cap of 0.035 USD" in result.stderr
    with pytest.raises(UsageError, match="--max-cost cannot be kept: gpt has no price"):
        judge("compare", answers, server, "--max-cost", "1")


def test_a_key_of_a_judges_own(server: ScriptedJudge, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--judge", f"llama={server.url},key-env=LLAMA_KEY"]
    with pytest.raises(UsageError, match="LLAMA_KEY holds no API key for llama"):
        judge("compare", answers, server, *more)
    monkeypatch.setenv("LLAMA_KEY", "secret")
    assert judge("compare", answers, server, *more).exit_code == 0
    assert b"secret" not in b"".join(file.read_bytes() for file in (answers.parent / "out").rglob("*") if file.is_file())


def test_criteria_that_are_missing_or_shown_nowhere(server: ScriptedJudge, answers: Path) -> None:
    with pytest.raises(StorageError, match="there is no file"):
        judge("grade", answers, server, "--prompt", "rubric", "--criteria", "nowhere.txt")
    with pytest.raises(UsageError, match="the prompt single shows no criteria"):
        judge("grade", answers, server, "--criteria", "nowhere.txt")


def test_a_schema_that_must_be_needs_a_prompt_with_one(server: ScriptedJudge, answers: Path) -> None:
    with pytest.raises(UsageError, match="--structured on: the prompt pair has no schema"):
        judge("compare", answers, server, "--structured", "on")


def test_drift_compares_with_the_verdicts_on_file(server: ScriptedJudge, answers: Path) -> None:
    judge("compare", answers, server)
    out = answers.parent / "out"
    result = invoke("drift", out)
    assert result.exit_code == 0, result.stderr
    assert "gpt: 6 tasks x 3, 0 failed; agreement with the verdicts on file 100.0 %" in result.stdout
    server.script = lambda body, number: Reply(text="[[B]]")
    result = invoke("drift", out)
    assert result.exit_code == 1
    assert "alarm: gpt: 0 of 18 new verdicts agree with those on file" in result.stderr
    with ScriptedJudge(lambda body, number: Reply(text="[[A]]")) as other:
        (drift,) = json.loads(invoke("drift", out, "--judge", f"gpt={other.url}", "--json").stdout)
        assert (drift["agreement"], len(other.bodies)) == (1.0, 18)


def test_a_judge_that_the_folder_does_not_know_is_no_judge_of_its_drift(server: ScriptedJudge, answers: Path) -> None:
    judge("compare", answers, server)
    with pytest.raises(UsageError, match="has no verdict of 'gtp'") as caught:
        invoke("drift", answers.parent / "out", "--judge", f"gtp={server.url}")
    assert "'gpt'" in caught.value.remedy
    # Of two verdicts that differ neither is the odd one.
    assert invoke("drift", answers.parent / "out", "--repeats", "1").exit_code == 2


def test_a_folder_that_another_run_writes_to_is_left_alone(server: ScriptedJudge, answers: Path) -> None:
    out = answers.parent / "out"
    with lock_folder(out):
        with pytest.raises(StorageError, match=r"another run writes to .*out now"):
            judge("compare", answers, server)
        assert judge("compare", answers, server, "--estimate").exit_code == 0
    assert server.bodies == []
    assert judge("compare", answers, server).exit_code == 0


def test_a_run_that_ends_early_leaves_no_manifest_of_an_earlier_one(server: ScriptedJudge, answers: Path) -> None:
    judge("compare", answers, server)
    out = answers.parent / "out"
    manifest = read_manifest(out, kind="verdicts")
    assert (manifest.settings["by"], manifest.settings["without_checked"]) == ("turn", False)
    server.script = lambda body, number: Reply(text="[[A]]", model=f"judge-{len(server.bodies)}")
    with pytest.raises(JudgeChangedError):
        judge("compare", answers, server, "--seed", "1", "--at-once", "1")
    assert not (out / "manifest.json").exists()


def test_answers_that_do_not_say_what_was_asked_need_questions(server: ScriptedJudge, answers: Path) -> None:
    more = ["--judge", "gpt", "--url", server.url, "--out", answers.parent / "out"]
    with pytest.raises(UsageError, match="does not say which questions it answers") as caught:
        invoke("compare", answers, *more)
    assert "--questions" in caught.value.remedy


def test_questions_that_have_changed_since_are_told(server: ScriptedJudge, answers: Path) -> None:
    questions = answers.parent / "q.jsonl"
    manifest = Manifest(
        kind="answers",
        name="answers",
        inputs={"questions": sha256_json(load_questions(str(questions)))},
        settings={"questions": str(questions)},
    )
    write_manifest(answers, manifest)
    more = ["--judge", "gpt", "--url", server.url, "--out", answers.parent / "out"]
    assert "has changed" not in invoke("compare", answers, *more).stderr
    questions.write_text(questions.read_text().replace("Shorter.", "Longer."))
    assert f"{questions} has changed since {answers} was answered" in invoke("compare", answers, *more).stderr


def test_waits_are_told_on_stderr(server: ScriptedJudge, answers: Path) -> None:
    server.script = lambda body, number: (
        Reply(status=429, headers={"retry-after": "0"}) if len(server.bodies) == 1 else Reply(text="[[A]]")
    )
    result = judge("compare", answers, server)
    assert result.exit_code == 0
    assert "gpt, limit reached: asked again in " in result.stderr
    assert "asked again" not in result.stdout
