"""Cleaning, splitting and tokenising against the reference: CPU seconds of the process tree, peak PSS, and what is lost.

    python benchmarks/bench_data.py --dump html.json --plain plain.json --tokenizer tokenizer.model [--reference PYTHON]

`--dump` is an HTML dump with `html_truth.json` beside it; `--plain` a ShareGPT array, cut off or not; `--tokenizer` a LLaMA
SentencePiece model. `--reference` is the Python of an environment with fschat 0.2.36, markdownify, polyglot and transformers 4;
without it only our side is measured. Writes `results/data.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
from llama_tokenizer import write_tokenizer_folder
from machine import RESULTS, describe_machine
from measured import Measured, run_measured

HERE = Path(__file__).parent
MAX_TOKENS = 2048
# Conversations of a packed row do not see each other, so a row may be longer than the longest of them.
ROW_CONVERSATIONS = 8
FORMAT = "vicuna_v1.1"
# What the reference's cleaning does: HTML, page debris, refusals, wrong roles, blank and short ones, twins.
_SAME_CLEANING = """
steps:
  - record_marks: {}
  - overlap: {}
  - roles: {}
  - html: {}
  - page_debris: {}
  - refusals: {rules: [speaks for another maker]}
  - length: {min_chars: 16}
  - exact_duplicates: {}
  - forks: {}
"""
# The reference's four stages, and the parts joined, which the reference does not do.
_SAME_WORK = """
steps:
  - overlap: {}
  - roles: {}
  - length: {}
  - language: {keep: [en]}
"""
_TWINS = ("exact_duplicates: exact duplicate", "near_duplicates: near duplicate", "forks: beginning of an earlier conversation")
# Each kind of fault in the dump: the ledger's reasons that fit it, and what a text that still has it holds.
FITTING: dict[str, tuple[tuple[str, ...], str]] = {
    "regen_1_2": (("page_debris: page counter cut",), r"\A1 / 2"),
    "copy_chars": (("page_debris: page tail cut",), r"Copy123 chars / 45 words\Z"),
    "too_many": (("page_debris: answer is a page notice",), r"Too many requests in 1 hour"),
    "blocked": (("refusals: speaks for another maker",), ""),
    "dup_id": (_TWINS, ""),
    "dup_value": (_TWINS, ""),
    "plugin": (("record_marks: marked plugins",), ""),
    "lead_gpt": (("roles: answer before the first question",), ""),
    "trail_human": (("roles: question without an answer",), ""),
    "empty_answer": (("length: blank answer",), ""),
    "empty_code": ((), r"Copy code|^```\n```$"),
    "too_short": (("length: too short",), ""),
    "wrong_roles": (("roles: questions in a row joined",), ""),
    "unicode_ws": (("length: blank answer", "page_debris: answer is a page notice"), ""),
}
FENCED = re.compile(r"^[ >]*(`{3,})([^\n`]*)\n(.*?)^[ >]*\1[ \t]*$", re.MULTILINE | re.DOTALL)


def figures(measured: Measured) -> dict[str, Any]:
    """What of a run goes into the results."""
    return {"cpu_s": round(measured.cpu_s, 2), "wall_s": round(measured.wall_s, 2), "peak_mb": round(measured.peak_bytes / 1e6)}


def ours(*arguments: str) -> Measured:
    """One of our commands."""
    return run_measured([sys.executable, "-m", "chaccu.cli.main", *arguments])


def bench_dump(dump: Path, folder: Path, reference: str | None) -> dict[str, Any]:
    """Clean the HTML dump, on both sides, and hold the results against the truth."""
    truth = json.loads(dump.with_name(dump.stem + "_truth.json").read_text(encoding="utf-8"))
    measured = ours("data", "clean", str(dump), "--out", str(folder / "dump"), "--workers", "1")
    kept = {row["id"]: row["messages"] for name in ("train", "validation") for row in _lines(folder / "dump" / f"{name}.jsonl")}
    config = folder / "same.yaml"
    config.write_text(_SAME_CLEANING, encoding="utf-8")
    same = ours("data", "clean", str(dump), "--out", str(folder / "same"), "--config", str(config), "--workers", "1")
    result: dict[str, Any] = {
        "ours_same_work": figures(same),
        "ours": {**figures(measured), **_hold_against(truth, dump, kept)},
    }
    result["ours"]["faults"] = _faults(truth["kinds"], kept, folder / "dump")
    if reference:
        out = folder / "reference_clean.json"
        command = [reference, "-m", "fastchat.data.clean_sharegpt", "--in-file", str(dump), "--out-file", str(out)]
        measured = run_measured(command)
        roles = {"human": "user", "gpt": "assistant"}
        kept = {
            row["id"]: [
                {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in row["conversations"]
            ]
            for row in json.loads(out.read_text(encoding="utf-8"))
        }
        result["reference"] = {**figures(measured), **_hold_against(truth, dump, kept)}
    return result


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _hold_against(truth: dict[str, Any], dump: Path, kept: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
    """Over the conversations without a fault of their own: code blocks that came through exactly, questions that changed."""
    raw = {record["id"]: record["conversations"] for record in json.loads(dump.read_text(encoding="utf-8"))}
    codes = exact = questions = changed = missing = 0
    for entry in truth["truth"]:
        if entry["id"] in truth["kinds"]:
            continue
        messages = kept.get(entry["id"])
        if messages is None:
            missing += 1
            continue
        found = Counter(block[2].rstrip("\n") for message in messages for block in FENCED.findall(message["content"]))
        found += Counter(_undented(block[2]) for message in messages for block in FENCED.findall(message["content"]))
        for turn in entry["turns"]:
            for _, code in turn.get("codes", []):
                if code.strip():
                    codes += 1
                    exact += found[code.rstrip("\n")] > 0 or found[_undented(code)] > 0
        asked = [turn["value"] for turn in raw[entry["id"]] if turn["from"] == "human"]
        for message in messages:
            if message["role"] == "user":
                questions += 1
                changed += message["content"] not in asked and not _is_joined(message["content"], asked)
    return {
        "conversations_missing": missing,
        "code_blocks": codes,
        "code_blocks_exact": exact,
        "questions": questions,
        "questions_changed": changed,
    }


def _is_joined(text: str, asked: list[str]) -> bool:
    """Whether a text is questions that stood in a row, each whole, with blank lines between."""
    for question in asked:
        if question and text.startswith(question):
            text = text.removeprefix(question).removeprefix("\n\n")
    return not text


def _undented(code: str) -> str:
    """A block inside a list or a quotation carries its margin."""
    return "\n".join(line.lstrip(" >") for line in code.rstrip("\n").split("\n"))


def _faults(kinds: dict[str, str], kept: dict[str, list[dict[str, str]]], folder: Path) -> dict[str, dict[str, Any]]:
    """For each kind of fault: its conversations, those that the ledger names for a fitting reason, those whose text came out
    without it, and what share of all conversations so named were labelled with it (real data has faults of its own)."""
    ledger = pl.read_parquet(folder / "ledger.parquet")
    named: dict[str, set[str]] = {}
    for record_id, step, reason in ledger.select("id", "step", "reason").iter_rows():
        named.setdefault(f"{step}: {reason}", set()).add(record_id)
    found: dict[str, dict[str, Any]] = {}
    for kind, (reasons, trace) in FITTING.items():
        labelled = {record_id for record_id, label in kinds.items() if label == kind}
        if kind == "dup_value":
            labelled = {record_id + "dup" for record_id in labelled}
        fitting = set().union(*(named.get(reason, set()) for reason in reasons))
        left = labelled - fitting
        clean = {record_id for record_id in left if trace and not _holds(trace, kept.get(record_id, []))}
        found[kind] = {
            "labelled": len(labelled),
            "named": len(labelled & fitting),
            "repaired": len(clean),
            "recall": round((len(labelled & fitting) + len(clean)) / len(labelled), 4) if labelled else None,
            "precision": round(len(labelled & fitting) / len(fitting), 4) if fitting else None,
        }
    return found


def _holds(trace: str, messages: list[dict[str, str]]) -> bool:
    return any(re.search(trace, message["content"]) for message in messages)


def bench_memory(dump: Path, folder: Path) -> dict[str, Any]:
    """Our peak over a quarter of the dump and over all of it, in one process."""
    records = json.loads(dump.read_text(encoding="utf-8"))
    quarter = folder / "quarter.json"
    quarter.write_text(json.dumps(records[: len(records) // 4], ensure_ascii=False, indent=0), encoding="utf-8")
    peaks = {
        name: ours("data", "clean", str(path), "--out", str(folder / name), "--workers", "1").peak_bytes
        for name, path in (("quarter", quarter), ("whole", dump))
    }
    return {name: round(peak / 1e6) for name, peak in peaks.items()} | {"growth": round(peaks["whole"] / peaks["quarter"], 3)}


def bench_plain(plain: Path, folder: Path, tokenizer: Path, reference: str | None) -> dict[str, Any]:
    """Language, split at 2,048 tokens, filters, training and validation split; then tokenise and mask the training rows."""
    config = folder / "clean.yaml"
    config.write_text(_SAME_WORK, encoding="utf-8")
    out = folder / "plain"
    # One process: what is reported is the CPU time of all processes, and a second one warms its caches anew.
    limits = ["--workers", "1", "--tokenizer", str(tokenizer), "--max-tokens", str(MAX_TOKENS), "--format", FORMAT]
    cleaned = ours("data", "clean", str(plain), "--out", str(out), "--config", str(config), *limits)
    arguments = (out / "train.jsonl", tokenizer, FORMAT, MAX_TOKENS, ROW_CONVERSATIONS * MAX_TOKENS)
    encoded = run_measured([sys.executable, str(HERE / "encode_dataset.py"), *map(str, arguments)])
    result: dict[str, Any] = {
        "ours": {
            "clean": figures(cleaned),
            "encode": {**figures(encoded), **json.loads(encoded.output.splitlines()[-1])},
            "over_the_limit": _over_limit(out),
        }
    }
    if reference:
        result["reference"] = _bench_reference_plain(plain, folder, tokenizer, reference)
    return result


def _over_limit(folder: Path) -> dict[str, int]:
    ledger = pl.read_parquet(folder / "ledger.parquet").filter(pl.col("step") == "token_limit")
    counts = ledger.group_by("action", "reason").len().sort("action", "reason")
    return {f"{action}: {reason}": number for action, reason, number in counts.iter_rows()}


def _bench_reference_plain(plain: Path, folder: Path, tokenizer: Path, reference: str) -> dict[str, Any]:
    whole = folder / "whole.json"
    text = plain.read_text(encoding="utf-8", errors="ignore")
    try:
        json.loads(text)
        shutil.copyfile(plain, whole)
    except json.JSONDecodeError:  # the reference reads whole arrays only
        whole.write_text(text[: text.rfind("\n  },\n  {")] + "\n  }\n]", encoding="utf-8")
    files = {name: folder / f"{name}.json" for name in ("language", "split", "filtered")}
    lengths = ["--model-name-or-path", tokenizer, "--max-length", MAX_TOKENS]
    stages = {
        "language": ["optional_clean", "--in-file", whole, "--out-file", files["language"], "--keep-lang", "en"],
        "split": ["split_long_conversation", "--in-file", files["language"], "--out-file", files["split"], *lengths],
        "filter": ["filter_wrong_format", "--in-file", files["split"], "--out-file", files["filtered"]],
        "train_test": ["split_train_test", "--in-file", files["filtered"], "--ratio", "0.98"],
    }
    runs = {
        name: run_measured([reference, "-m", f"fastchat.data.{module}", *map(str, arguments)])
        for name, (module, *arguments) in stages.items()
    }
    train = folder / "filtered_train.json"
    encoded = run_measured([reference, str(HERE / "reference_encode.py"), str(train), str(tokenizer), str(MAX_TOKENS)])
    total = sum(list(runs.values())[1:], start=next(iter(runs.values())))
    return {
        "clean": figures(total),
        "stages": {name: figures(run) for name, run in runs.items()},
        "encode": {**figures(encoded), **json.loads(encoded.output.splitlines()[-1])},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", type=Path, required=True)
    parser.add_argument("--plain", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--reference")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = write_tokenizer_folder(options.tokenizer, folder / "tokenizer")
        result = {
            "machine": describe_machine("chaccu", "tokenizers", "html-to-markdown", "polars"),
            "dump": bench_dump(options.dump, folder, options.reference),
            "memory": bench_memory(options.dump, folder),
            "plain": bench_plain(options.plain, folder, tokenizer, options.reference),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
