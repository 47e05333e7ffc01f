"""A real model in full: Gemma 3 270M on cleaned ShareGPT conversations, and each lean optimizer beside float32 AdamW.

    chaccu demo --exit                                   unpacks the base and cleans the data
    python benchmarks/bench_gemma.py --base runs/demo/base --data runs/demo/data

Each way of `WAYS` from the same base over the same part of the conversations, then one epoch of all of them with AdamW on
float32 weights. Everything goes through the loop that `chaccu train` runs. Writes `results/gemma-h100.json`, named
after the GPU: held-out loss before, on the way and after, the loss of every tenth step, tokens a second, memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from machine import describe_machine, results_file, write_results

from chaccu.conversation import TextTokenizer, load_format
from chaccu.train.encode import encode_sources
from chaccu.train.loop import evaluate, run_steps
from chaccu.train.model import TrainableModel
from chaccu.train.pack import PackedRow, pack_rows
from chaccu.train.recipe import DataSource, Recipe
from chaccu.train.report import StepReport

FORMAT, SEQUENCE_LEN = "gemma-3", 2048
WAYS: dict[str, dict[str, Any]] = {
    "adamw, float32 weights": {"optimizer": "adamw"},
    "adamw_8bit in backward": {"optimizer": "adamw_8bit", "optimizer_in_backward": True},
    "adamw_bf16_sr": {"optimizer": "adamw_bf16_sr"},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "adamw, fp8 products": {"optimizer": "adamw", "precision": "fp8"},
    "adafactor": {"optimizer": "adafactor"},
}


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768, help="of a row, which is a step")
    parser.add_argument("--share", type=float, default=0.2, help="of the rows, that each optimizer is compared on")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--max-minutes", type=float, help="of the epoch of all conversations")
    parser.add_argument("--only-ways", action="store_true", help="leave out the epoch of all conversations")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--commit", help="what is measured, where the code lies outside of its repository")
    options = parser.parse_args()
    base = Recipe(
        model=str(options.base),
        data=[DataSource(path=str(options.data / "train.jsonl"))],
        validation=[DataSource(path=str(options.data / "validation.jsonl"))],
        output="-",
        format=FORMAT,
        method="full",
        sequence_len=SEQUENCE_LEN,
        micro_batch_tokens=options.tokens,
        learning_rate=1e-4,
        warmup_ratio=0.03,
        precision="bf16",
        compile=not options.eager,
    )
    begun = time.perf_counter()
    tokenizer = TextTokenizer.load(options.base)
    rows, held_out = (load_rows(sources, base, tokenizer) for sources in (base.data, base.validation))
    part = rows[: max(1, round(options.share * len(rows)))]
    print(
        f"{len(rows)} rows, {sum(len(row.ids_T) for row in rows):,} tokens, in {time.perf_counter() - begun:.0f} s", flush=True
    )
    results = results_file("gemma", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {"runs": {}}
    runs = [(name, WAYS[name], part) for name in options.ways]
    if not options.only_ways:
        runs.append(("all conversations", {"optimizer": "adamw", "max_minutes": options.max_minutes}, rows))
    about = describe_machine("torch", "triton", "transformers", "flash-attn-4", "torchao", commit=options.commit)
    for name, changes, chosen in runs:
        found["runs"][name] = {**about, **run_once(msgspec.structs.replace(base, **changes), chosen, held_out)}
        print(name, json.dumps({key: value for key, value in found["runs"][name].items() if key != "loss"}), flush=True)
        write_results(found, results)


def load_rows(sources: Sequence[DataSource], recipe: Recipe, tokenizer: TextTokenizer) -> list[PackedRow]:
    """The conversations of `sources`, encoded and packed."""
    encoded = encode_sources(sources, load_format(FORMAT), tokenizer, sequence_len=SEQUENCE_LEN, seed=0)
    return pack_rows(encoded, recipe.row_len, seed=0)


def run_once(recipe: Recipe, rows: Sequence[PackedRow], held_out: Sequence[PackedRow]) -> dict[str, Any]:
    """One run from the base, evaluated before, four times on the way, and after."""
    begun = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TrainableModel(recipe, device)
    curve = {0: evaluate(model, held_out)}

    def look(step: StepReport) -> None:
        if step.step % max(1, step.steps // 5) == 0 and step.step < step.steps:
            curve[step.step] = evaluate(model, held_out)

    log = run_steps(model, rows, recipe, look)
    curve[len(log)] = evaluate(model, held_out)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "steps": len(log),
        "tokens": sum(len(row.ids_T) for row in rows),
        "trained_tokens": sum(row.trained_tokens for row in rows),
        "held_out": curve,
        "skipped": sum(step.skipped for step in log),
        "tokens_per_s": round(statistics.median(step.tokens_per_s for step in log)),
        "mfu": log[-1].mfu,
        "peak_gb": round(max(step.memory_bytes for step in log) / 1e9, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "loss": [step.loss for step in log[::10]],
    }


if __name__ == "__main__":
    main()
