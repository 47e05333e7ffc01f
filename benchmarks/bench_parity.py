"""Whether the lean optimizers keep the quality of float32 AdamW: the same model, data and schedule, each way.

    python benchmarks/bench_parity.py --data rows.npz
    python benchmarks/bench_parity.py --data rows.npz --ways adafactor adamw_bf16_sr

Trains a random LLaMA of 134 million weights for one epoch of `--data` (as in bench_train.py) with each optimizer through the
real loop, and measures the loss on conversations held out. A step takes 16,384 tokens each way: one row, or four of 4,096 that
are accumulated. Writes `results/parity-h100.json`, with the loss of every twentieth step and the most memory that was
allocated; `--ways` leaves the other ways there as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import bench_train
import msgspec
import torch
from machine import RESULTS

from chaccu.train.loop import evaluate, run_steps
from chaccu.train.model import TrainableModel
from chaccu.train.pack import pack_rows
from chaccu.train.recipe import DataSource, Recipe

bench_train.SHAPES["134m"] = (768, 12, 12, 12, 2048)
HELD_OUT, TOKENS = 300, 16384
WAYS: dict[str, dict[str, Any]] = {
    "adamw, float32 weights": {"optimizer": "adamw"},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "adamw_8bit in backward": {"optimizer": "adamw_8bit", "optimizer_in_backward": True},
    "adamw_bf16_sr": {"optimizer": "adamw_bf16_sr"},
    "adafactor": {"optimizer": "adafactor"},
    "adamw, float32 weights, 4 rows a step": {"optimizer": "adamw", "gradient_accumulation_steps": 4},
    "adamw_8bit in backward, 4 rows a step": {
        "optimizer": "adamw_8bit",
        "optimizer_in_backward": True,
        "gradient_accumulation_steps": 4,
    },
}


def main() -> None:
    """Train each way, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=6000)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    sequences = bench_train.load_sequences(options.data, options.sequences)
    base = Recipe(
        model="random",
        data=[DataSource(path="-")],
        output="-",
        format="vicuna_v1.1",
        method="full",
        sequence_len=bench_train.SEQUENCE_LEN,
        micro_batch_tokens=TOKENS,
        learning_rate=1e-3,
        warmup_ratio=0.05,
        weight_decay=0.01,
        precision="bf16",
        compile=True,
    )
    results = RESULTS / "parity-h100.json"
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {"runs": {}}
    for name in options.ways:
        recipe = msgspec.structs.replace(base, **WAYS[name])
        recipe = msgspec.structs.replace(recipe, micro_batch_tokens=TOKENS // recipe.gradient_accumulation_steps)
        held_out = pack_rows(sequences[:HELD_OUT], recipe.row_len, seed=0)
        rows = pack_rows(sequences[HELD_OUT:], recipe.row_len, seed=0)
        torch.manual_seed(0)
        causal = bench_train.build_causal_lm("134m")
        model = TrainableModel(recipe, torch.device("cuda"), causal=causal.float() if recipe.optimizer == "adamw" else causal)
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        before = evaluate(model, held_out)
        log = run_steps(model, rows, recipe)
        found["runs"][name] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "steps": len(log),
            "held_out_before": before,
            "held_out_after": evaluate(model, held_out),
            "seconds": round(time.perf_counter() - begun, 1),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "loss": [round(step.loss, 4) for step in log[::20]],
            "grad_norm": [round(step.grad_norm, 3) for step in log[::20]],
        }
        print(name, json.dumps({key: value for key, value in found["runs"][name].items() if key != "grad_norm"}), flush=True)
        results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        # The next way would otherwise be trained beside this one's weights.
        del model, causal


if __name__ == "__main__":
    main()
