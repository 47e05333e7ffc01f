from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaccu.artifact import read_manifest, verify_files
from chaccu.conversation import encode_conversation, load_format
from chaccu.data.clean import CleanReport, clean_conversations
from chaccu.data.config import default_config_text, load_config
from chaccu.data.outcome import CorpusStep
from chaccu.data.partition import place_of
from chaccu.data.records import bare_source, read_conversations
from chaccu.errors import ChaccuError, DataError, RecipeError, StorageError, UsageError
from chaccu.testing.tiny import build_tokenizer

from .conftest import share_record

Dump = Callable[..., Path]


def total(counts: dict[str, dict[str, int]]) -> int:
    return sum(sum(reasons.values()) for reasons in counts.values())


def check_books(report: CleanReport, out: Path) -> polars.DataFrame:
    """The counts add up, the ledger agrees with them, the files with the manifest. Returns the ledger."""
    ledger = polars.read_parquet(out / "ledger.parquet")
    assert ledger.columns == ["id", "origin", "step", "action", "reason", "before_chars", "after_chars"]
    assert report.read == report.kept + total(report.dropped)
    for action, counts in (("dropped", report.dropped), ("changed", report.changed)):
        rows = ledger.filter(polars.col("action") == action)
        assert rows.height == total(counts)
        for step, reasons in counts.items():
            for reason, count in reasons.items():
                assert rows.filter((polars.col("step") == step) & (polars.col("reason") == reason)).height == count
    manifest = read_manifest(out, kind="dataset")
    verify_files(out, manifest.files)
    assert manifest.facts["read"] == report.read
    for name, count in report.rows.items():
        assert sum(1 for _ in read_conversations(out / name)) == count
    return ledger


def test_a_dump_with_faults_reconciles(tmp_path: Path, write_dump: Dump) -> None:
    good = [share_record(number) for number in range(30)]
    page = '<div class="markdown"><p>All I <b>know</b> about the matter, on a page.</p></div>'
    leading = {"id": "Lead_1", "conversations": [{"from": "gpt", "value": "go on"}, *share_record(77)["conversations"]]}
    html = {"id": "Html_0", "conversations": [{"from": "human", "value": "What do you know?"}, {"from": "gpt", "value": page}]}
    bad: list[Any] = [
        7,
        None,
        "text",
        [],
        {"id": "NoTurns_0", "conversations": []},
        {"id": 5},
        {"id": "Wrong_0", "conversations": [{"from": 1, "value": 2}, 3]},
        {"id": "Blank_0", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
        {"id": "Surrogate_0", "conversations": [{"from": "human", "value": "\ud800"}]},
        {"id": "Again_0", "conversations": good[3]["conversations"]},
    ]
    out = tmp_path / "out"
    report = clean_conversations([str(write_dump([*good, leading, html, *bad]))], out)
    ledger = check_books(report, out)
    assert (report.read, report.kept) == (42, 32)
    assert report.dropped["read"] == {"record is no object": 4, "record has no list of turns": 1, "lone surrogate": 1}
    assert report.dropped["exact_duplicates"] == {"exact duplicate": 1}
    assert report.dropped["length"] == {"blank answer": 1}
    assert report.changed == {"roles": {"answer before the first question": 1}, "html": {"HTML answer to Markdown": 1}}
    assert set(ledger["origin"]) == {str(tmp_path / "dump.json")}
    row = ledger.row(by_predicate=polars.col("id") == "Lead_1", named=True)
    assert row["before_chars"] - row["after_chars"] == len("go on")
    assert ledger.filter(polars.col("action") == "dropped")["after_chars"].sum() == 0


def test_report_page_is_whole_and_escaped(tmp_path: Path, write_dump: Dump) -> None:
    attack = {"id": "<script>alert(1)</script>", "conversations": [{"from": "human", "value": "<img src=x onerror=alert(1)>"}]}
    clean_conversations([str(write_dump([share_record(1), share_record(2), attack]))], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert "onerror=alert(1)&gt;" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert "prefers-color-scheme: dark" in page
    assert "question without an answer" in page


def test_with_a_tokenizer_the_report_counts_tokens_and_marks_what_is_trained(tmp_path: Path, write_dump: Dump) -> None:
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    config = load_config().with_token_limit(str(tmp_path / "tokenizer"), 400, "chatml")
    report = clean_conversations([str(write_dump([share_record(number) for number in range(20)]))], tmp_path / "out", config)
    written = [one for name in report.rows for one in read_conversations(tmp_path / "out" / name)]
    chatml = load_format("chatml")
    assert report.stats.tokens == sum(len(encode_conversation(one, chatml, tokenizer).ids) for one in written)
    assert sum(report.stats.tokens_histogram.values()) == len(written) == sum(report.rows.values())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    marked = [html.unescape(text) for text in re.findall(r"<mark>(.*?)</mark>", page, re.DOTALL)]
    answers = {message.content for one in written for message in one.messages if message.role == "assistant"}
    assert marked
    assert {text.removesuffix("<|im_end|>") for text in marked} <= answers


def test_parts_of_one_conversation_are_never_on_both_sides(tmp_path: Path, write_dump: Dump) -> None:
    records = [
        share_record(number + 100 * part, part=part) | {"id": f"Talk{number}_{part}"}
        for number in range(60)
        for part in range(3)
    ]
    other = write_dump([share_record(number + 5000) | {"id": f"Talk{number}_9"} for number in range(60)], "other.json")
    out = tmp_path / "out"
    report = clean_conversations([str(write_dump(records)), str(other)], out, validation_share=0.3)
    check_books(report, out)
    sides = [{bare_source(c.source) for c in read_conversations(out / name)} for name in ("train.jsonl", "validation.jsonl")]
    assert len(sides[0]) + len(sides[1]) == 60
    assert not sides[0] & sides[1]
    assert len(sides[1]) > 5
    origins = {c.source.rpartition("#")[0] for c in read_conversations(out / "train.jsonl")}
    assert origins == {str(tmp_path / "dump.json"), str(other)}


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_neither_side_is_empty_when_there_are_two_sources(tmp_path: Path, write_dump: Dump, share: float) -> None:
    records = [share_record(number) for number in range(5)]
    report = clean_conversations([str(write_dump(records))], tmp_path / "out", validation_share=share)
    check_books(report, tmp_path / "out")
    assert min(report.rows.values()) == 1
    assert sum(report.rows.values()) == 5
    whole = clean_conversations([str(write_dump(records))], tmp_path / "whole", validation_share=0)
    assert whole.rows == {"train.jsonl": 5, "validation.jsonl": 0}


def test_the_split_follows_the_seed_and_looks_even() -> None:
    places = [place_of(f"dump#Talk{number}", 0) for number in range(4000)]
    assert 0.08 < sum(place < 0.1 for place in places) / 4000 < 0.12
    assert place_of("a#Talk1", 0) == place_of("b#Talk1", 0) != place_of("a#Talk1", 1)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_equal_runs_are_equal_byte_for_byte_with_any_number_of_workers(tmp_path: Path, write_dump: Dump) -> None:
    records = [share_record(number % 900, part=number // 900) for number in range(1300)]
    source = str(write_dump([*records, 3, {"id": "x"}]))
    results = []
    for workers in (1, 1, 2):
        clean_conversations([source], tmp_path / "out", fresh=True, workers=workers)
        results.append(folder_bytes(tmp_path / "out"))
    assert results[0] == results[1] == results[2]
    assert set(results[0]) == {"train.jsonl", "validation.jsonl", "ledger.parquet", "manifest.json", "report.html"}


def test_an_equal_dataset_is_reused_and_a_damaged_or_other_one_is_not(tmp_path: Path, write_dump: Dump) -> None:
    source, out = str(write_dump([share_record(number) for number in range(8)])), tmp_path / "out"
    first = clean_conversations([source], out)
    again = clean_conversations([source], out)
    assert (first.reused, again.reused) == (False, True)
    assert (again.read, again.kept, again.stats, again.rows) == (first.read, first.kept, first.stats, first.rows)
    assert not clean_conversations([source], out, fresh=True).reused
    assert not clean_conversations([source], out, seed=1).reused
    (out / "train.jsonl").write_bytes(b"{}\n")
    assert not clean_conversations([source], out, seed=1).reused


def test_a_folder_that_is_no_dataset_is_never_replaced(tmp_path: Path, write_dump: Dump) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no dataset"):
        clean_conversations([str(write_dump([share_record(1)]))], out, fresh=True)
    assert (out / "thesis.txt").exists()


def test_a_cut_file_is_salvaged_and_strict_refuses_it(tmp_path: Path, write_dump: Dump) -> None:
    whole = write_dump([share_record(number) for number in range(9)]).read_bytes()
    cut = tmp_path / "cut.json"
    cut.write_bytes(whole[:-200])
    report = clean_conversations([str(cut)], tmp_path / "out")
    check_books(report, tmp_path / "out")
    assert report.read == 8
    found = report.cuts[str(cut)]
    assert (found.after_record, found.size_bytes) == (8, len(whole) - 200)
    assert whole[: found.offset].endswith(b"}")
    assert found.offset + found.unread_bytes == len(whole) - 200
    assert f"{found.offset:,}" in report.warnings()[0]
    for out in (tmp_path / "strict", tmp_path / "out"):
        with pytest.raises(DataError, match="cut off"):
            clean_conversations([str(cut)], out, strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "no record could be read"),
        ('[{"id": "a', "no record could be read"),
        ('[{"prompt": "x", "completion": "y"}]', "no reader recognises"),
        ("a,b\n1,2\n", "no JSON array"),
        ('[{"id": "a", "conversations": []}]', "nothing is left of 1 records"),
    ],
)
def test_unusable_input_is_one_clear_error_and_leaves_nothing(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "dump.json"
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        clean_conversations([str(path)], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dump.json"]


def test_chaccu_jsonl_goes_round_unchanged(tmp_path: Path, write_dump: Dump) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    clean_conversations([str(write_dump([share_record(number) for number in range(20)]))], first)
    report = clean_conversations([str(first / "train.jsonl"), str(first / "validation.jsonl")], second)
    assert report.kept == report.read == 20
    for name in ("train.jsonl", "validation.jsonl"):
        assert (second / name).read_bytes() == (first / name).read_bytes()


class TestConfig:
    def test_default_is_valid_and_plain(self) -> None:
        names = [step.name for step in load_config().steps]
        assert names[:5] == ["record_marks", "overlap", "roles", "html", "page_debris"]
        assert names[5:] == [
            "refusals",
            "length",
            "language",
            "repetition",
            "decontaminate",
            "exact_duplicates",
            "forks",
            "near_duplicates",
        ]
        json.dumps(load_config().settings())

    def test_in_the_default_only_steps_that_compare_stand_behind_one_that_compares(self) -> None:
        """They remember what a later step drops: of a pair both could go."""
        kinds = [isinstance(step, CorpusStep) for step in load_config().steps]
        assert kinds == sorted(kinds)
        assert any(kinds)

    def test_what_the_default_has_as_comments_loads_as_it_stands(self, tmp_path: Path) -> None:
        path = tmp_path / "clean.yaml"
        path.write_text(re.sub(r"^# (-| {4}|  - )", r"  \1", default_config_text(), flags=re.MULTILINE))
        steps = {step.name: step for step in load_config(path).steps}
        assert {"moderation", "pii"} < steps.keys()
        assert (steps["pii"].describe()["email"], steps["pii"].describe()["phone"]) == ("mask", "off")

    def test_words_that_old_yaml_takes_for_booleans_are_words(self, tmp_path: Path) -> None:
        path = tmp_path / "clean.yaml"
        path.write_text(
            "steps: [{roles: {names: {yes: user, 2024-01-01: assistant}}}, {pii: {email: off, phone_regions: [NO],"
            " questions: true}}, {language: {keep: [no, en]}}]"
        )
        roles, pii, language = (step.describe() for step in load_config(path).steps)
        assert roles["names"] == {"yes": "user", "2024-01-01": "assistant"}
        assert (pii["email"], pii["phone_regions"], pii["questions"]) == ("off", ("NO",), True)
        assert language["keep"] == ("no", "en")

    @pytest.mark.parametrize("settings", ["off", "false", "[]", "0"])
    def test_settings_that_are_none_are_refused(self, tmp_path: Path, settings: str) -> None:
        path = tmp_path / "clean.yaml"
        path.write_text(f"steps: [roles, {{html: {settings}}}]")
        with pytest.raises(RecipeError, match="html"):
            load_config(path)

    def test_a_token_limit_keeps_what_the_configuration_says_of_it(self, tmp_path: Path) -> None:
        path = tmp_path / "clean.yaml"
        path.write_text(
            "steps: [roles, {token_limit: {tokenizer: t, max_tokens: 99, chat_format: gemma-3, long_questions: leave_out}}]"
        )
        config = load_config(path)
        *_, limit = config.with_token_limit("other", 400, "llama-3").steps
        assert limit.describe() == {
            "tokenizer": "other",
            "max_tokens": 400,
            "chat_format": "llama-3",
            "long_questions": "leave_out",
        }
        *others, limit = config.with_token_limit("other", 400).steps
        assert [step.name for step in others] == ["roles"]
        assert limit.describe()["chat_format"] == "gemma-3"
        assert load_config().with_token_limit("t", 400).steps[-1].describe()["chat_format"] == "chatml"

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("steps: [{rolse: {}}]", "did you mean 'roles'"),
            ("steps: [{roles: {}}, {length: {min_char: 1}}]", "min_char"),
            ("steps: [{roles: {}}, {length: {min_chars: -1}}]", "min_chars"),
            ("steps: [{length: {}}]", "first step must be 'roles'"),
            ("steps: [{roles: {}}, {html: {}}, {html: {}}]", "named twice"),
            ("steps: [{roles: {}}, {overlap: {}}]", "'overlap' is too late"),
            ("reader: sharegtp\nsteps: [{roles: {}}]", "did you mean 'sharegpt'"),
            ("steps: [{roles: {names: {Hal: assistant, hal: user}}}]", "case does not tell names apart"),
            ("steps: [{roles: {}}, {language: {keep: [english]}}]", "did you mean 'en'"),
            ("steps: [{roles: {}}, {language: {skip: [zh-hant]}}]", "did you mean 'zh-Hant'"),
            ("steps: [{roles: {}}, {language: {keep: [en-GB]}}]", "no language has the code 'en-GB'"),
            ("steps: [roles: {]", "no YAML"),
            ("- roles", "no configuration"),
            ("steps: [{roles: {}}, {token_limit: {tokenizer: t, max_tokens: 99}}, {html: {}}]", "must be the last"),
        ],
    )
    def test_each_mistake_is_named(self, tmp_path: Path, text: str, told: str) -> None:
        path = tmp_path / "clean.yaml"
        path.write_text(text)
        with pytest.raises((RecipeError, UsageError)) as caught:
            load_config(path)
        assert told in str(caught.value)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"none\.yaml"):
            load_config(tmp_path / "none.yaml")

    def test_a_step_that_is_left_out_does_not_run(self, tmp_path: Path, write_dump: Dump) -> None:
        path = tmp_path / "clean.yaml"
        path.write_text("steps: [roles]")
        record = share_record(1)
        report = clean_conversations([str(write_dump([record, record, share_record(2)]))], tmp_path / "out", load_config(path))
        assert report.kept == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "tool", "x"]) | JSON, "value": JSON | st.just("<p>x</p>")}
)
RECORD = JSON | st.fixed_dictionaries({"id": JSON, "conversations": st.lists(TURN | JSON, max_size=5) | JSON})


@given(st.lists(RECORD, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_records_of_any_shape_end_kept_or_in_the_ledger(tmp_path: Path, records: list[Any]) -> None:
    path, out = tmp_path / "fuzz.json", tmp_path / "out"
    path.write_text(json.dumps([share_record(1), *records]), encoding="utf-8", errors="surrogatepass")
    report = clean_conversations([str(path)], out, fresh=True)
    assert report.read == len(records) + 1
    check_books(report, out)


RUN = """
import sys
from pathlib import Path
from chaccu.data.clean import clean_conversations
if __name__ == "__main__":
    clean_conversations([sys.argv[1]], Path(sys.argv[2]), workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize(("signal_number", "workers"), [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 2)])
def test_a_killed_run_leaves_nothing_half_written(tmp_path: Path, write_dump: Dump, signal_number: int, workers: int) -> None:
    source, out, script = (
        write_dump([share_record(number, rounds=3) for number in range(3000)]),
        tmp_path / "out",
        tmp_path / "run.py",
    )
    script.write_text(RUN)
    process = subprocess.Popen(
        [sys.executable, str(script), str(source), str(out), str(workers)], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if any(folder.stat().st_size for folder in tmp_path.glob(".out.tmp-*/train.jsonl")):
            break
        time.sleep(0.005)
    process.send_signal(signal_number)
    assert process.wait(60) != 0
    assert not out.exists()
    if signal_number == signal.SIGINT:
        assert not list(tmp_path.glob(".out*"))
    while time.monotonic() < deadline and _session_is_alive(process.pid):
        time.sleep(0.05)
    assert not _session_is_alive(process.pid)
    clean_conversations([str(source)], out)
    after = folder_bytes(out)
    assert not list(tmp_path.glob(".out*"))
    clean_conversations([str(source)], out, fresh=True)
    assert folder_bytes(out) == after


def _session_is_alive(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_disk_full_leaves_nothing(tmp_path: Path, write_dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "train.jsonl"))

    monkeypatch.setattr("chaccu.data.partition.PartitionWriter.add", no_space)
    with pytest.raises(ChaccuError, match="no space left"):
        clean_conversations([str(write_dump([share_record(1)]))], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dump.json"]
