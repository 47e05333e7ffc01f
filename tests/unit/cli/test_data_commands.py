from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from chaccu.cli.data import app
from chaccu.errors import DataError, UsageError

RUNNER = CliRunner()


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    records = [
        {
            "id": f"Talk{number}_0",
            "conversations": [
                {"from": "human", "value": f"What is special about the number {number}?"},
                {"from": "gpt", "value": f"The number {number} comes after {number - 1} and before {number + 1}."},
            ],
        }
        for number in range(12)
    ]
    path = tmp_path / "dump.json"
    path.write_text(json.dumps([*records, records[0], {"id": "Bad_0", "conversations": []}]))
    return path


def test_clean_prints_counts_that_add_up(dump: Path, tmp_path: Path) -> None:
    arguments = ["clean", str(dump), "--out", str(tmp_path / "out"), "--validation-share", "0.2"]
    result = RUNNER.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "14 read = 12 kept + 2 dropped" in result.stdout
    assert "exact_duplicates: exact duplicate" in result.stdout
    again = RUNNER.invoke(app, arguments, catch_exceptions=False)
    assert "was there already" in again.stdout


def test_clean_json_is_one_object_and_the_warning_is_on_stderr(dump: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_bytes(dump.read_bytes()[:-100])
    out = str(tmp_path / "out")
    result = RUNNER.invoke(app, ["clean", str(cut), "--out", out, "--json"], catch_exceptions=False)
    counts = json.loads(result.stdout)
    assert counts["read"] == counts["kept"] + sum(sum(reasons.values()) for reasons in counts["dropped"].values())
    assert counts["cuts"][str(cut)]["after_record"] == 12
    assert "cut off at byte" in result.stderr
    with pytest.raises(DataError, match="cut off"):
        RUNNER.invoke(app, ["clean", str(cut), "--out", out, "--strict"], catch_exceptions=False)


def test_options_that_belong_together(dump: Path, tmp_path: Path) -> None:
    for arguments in (
        ["clean", str(dump), "--out", str(tmp_path / "out"), "--max-tokens", "100"],
        ["show", str(dump.with_name("i.jsonl")), "--format", "chatml"],
    ):
        RUNNER.invoke(app, ["identity", "--name", "Vicky", "--out", str(dump.with_name("i.jsonl"))], catch_exceptions=False)
        with pytest.raises(UsageError, match="belong together"):
            RUNNER.invoke(app, arguments, catch_exceptions=False)
    with pytest.raises(UsageError, match="--format alone changes nothing"):
        RUNNER.invoke(app, ["clean", str(dump), "--out", str(tmp_path / "out"), "--format", "chatml"], catch_exceptions=False)


def test_config_prints_what_clean_accepts(dump: Path, tmp_path: Path) -> None:
    config = tmp_path / "clean.yaml"
    config.write_text(RUNNER.invoke(app, ["config"], catch_exceptions=False).stdout)
    result = RUNNER.invoke(
        app, ["clean", str(dump), "--out", str(tmp_path / "out"), "--config", str(config)], catch_exceptions=False
    )
    assert result.exit_code == 0


def test_identity_stats_and_show(tmp_path: Path) -> None:
    file = str(tmp_path / "identity.jsonl")
    result = RUNNER.invoke(app, ["identity", "--name", "Vicky", "--out", file], catch_exceptions=False)
    assert "10 wordings held out" in result.stdout
    stats = json.loads(RUNNER.invoke(app, ["stats", file, "--json"], catch_exceptions=False).stdout)
    assert stats["identity.jsonl"]["turns"] == 2 * stats["identity.jsonl"]["conversations"]
    assert "conversations" in RUNNER.invoke(app, ["stats", file], catch_exceptions=False).stdout
    shown = RUNNER.invoke(app, ["show", file, "--index", "1"], catch_exceptions=False).stdout
    assert "user\nHi! Who are you?\nassistant\n" in shown
    with pytest.raises(UsageError, match="there is no conversation 999"):
        RUNNER.invoke(app, ["show", file, "--index", "999"], catch_exceptions=False)


def test_show_colours_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / "one.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "ping\\u001b[31m"}, {"role": "assistant", "content": "pong"}]}\n'
    )
    result = RUNNER.invoke(
        app, ["show", str(file), "--format", "chatml", "--tokenizer", str(tmp_path)], catch_exceptions=False, color=True
    )
    assert "\x1b[32mpong<|im_end|>" in result.stdout
    assert "\\x1b[31m" in result.stdout
    trained = len("pong<|im_end|>")
    assert f"{trained} of" in result.stdout
