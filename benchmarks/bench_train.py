"""Training speed on one GPU: useful tokens a second, share of the chip's peak, memory; LLaMA shapes on packed conversations.

    python benchmarks/bench_train.py --data rows.npz --shape 7b --tokens 16384 --checkpoint none --in-backward
    python benchmarks/bench_train.py --data rows.npz --shape 13b --tokens 4096 --checkpoint full --method qlora

`--data` is an .npz with `ids`, `mask` (1 = trained) and `off` (where each conversation begins, and the end). Useful tokens are
those of conversations; the share of the peak (MFU) is that of `chaccu.train.flops`, which gives nothing for what is computed
twice, and 4 FLOPs instead of 6 for a weight that is frozen. Weights are random; the data and the work are real. Prints one
JSON line. `bench_training_table.py` runs the documented ones and holds them beside their bars.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from shapes import SEQUENCE_LEN, SHAPES, VOCABULARY

from chaccu.train.attention import attends_at_once, register_attention
from chaccu.train.flash_attention import has_flash_attention, serves_width
from chaccu.train.flops import count_model_flops, find_device_peak
from chaccu.train.loop import run_steps
from chaccu.train.model import TrainableModel
from chaccu.train.nf4 import pack_linear
from chaccu.train.pack import PackedRow, TokenSequence, pack_rows
from chaccu.train.recipe import DataSource, LoraOptions, Recipe
from chaccu.train.report import StepReport

WARM_UP = 3


def build_causal_lm(shape: str, *, packed: bool = False, device: str = "cuda") -> Any:
    """A LLaMA of that shape with random bfloat16 weights. `packed`: its layers are built and packed into 4 bits one by one."""
    width, layers, heads, groups, inner = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=0 if packed else layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQUENCE_LEN,
        use_cache=False,
    )
    config._attn_implementation = register_attention()
    with torch.device(device):
        causal = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=register_attention()
        )
        if packed:
            causal.config.num_hidden_layers = layers
            for number in range(layers):
                causal.model.layers.append(build_packed_layer(causal.config, number))
    return causal


def build_packed_layer(config: Any, number: int) -> torch.nn.Module:
    """A LLaMA's decoder layer with random weights in 4 bits, its norms in bfloat16."""
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer(config, number).to(torch.bfloat16)
    for name, module in list(layer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            layer.set_submodule(name, pack_linear(module.weight.detach()))
    return layer


def load_sequences(path: Path, count: int) -> list[TokenSequence]:
    """The first `count` conversations of the file."""
    data = np.load(path)
    ids, mask, ends = data["ids"], data["mask"], data["off"]
    return [
        TokenSequence(ids[begin:end].astype(np.int32), mask[begin:end].astype(np.int8))
        for begin, end in pairwise(ends[: count + 1])
        if mask[begin + 1 : end].any()
    ]


def main() -> None:
    """Measure and print."""
    print(json.dumps(measure(build_parser().parse_args())))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of one forward pass")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--checkpoint", default="none", help="none, selective, full, or a number of layers")
    parser.add_argument("--in-backward", action="store_true")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--peak", type=float, help="FLOP/s of the chip in 16 bits; left out: the data sheet's, if it is known")
    parser.add_argument("--profile", action="store_true", help="also print where the time of a step goes")
    return parser


def build_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that is measured."""
    return Recipe(
        model="random",
        data=[DataSource(path="-")],
        output="-",
        format="vicuna_v1.1",
        method=options.method,
        lora=LoraOptions(rank=options.rank),
        sequence_len=SEQUENCE_LEN,
        micro_batch_tokens=options.tokens,
        gradient_accumulation_steps=options.accumulate,
        precision=options.precision,
        optimizer="adamw_8bit" if options.method == "full" else "adamw",
        optimizer_in_backward=options.in_backward,
        activation_checkpointing="full" if options.checkpoint.isdigit() else options.checkpoint,
        compile=not options.eager,
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps, through the loop that `chaccu train` runs, and report their median."""
    recipe = build_recipe(options)
    causal = build_causal_lm(options.shape, packed=options.method == "qlora")
    model = TrainableModel(recipe, torch.device("cuda"), causal=causal)
    loading_gb = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    if options.checkpoint.isdigit() and model.checkpoints is not None:
        model.checkpoints.spread(int(options.checkpoint))
    rows = choose_rows(options)
    kernels = StepProfile(options.steps + WARM_UP if options.profile else None)
    log = run_steps(model, rows, recipe, kernels.step_done)[WARM_UP : WARM_UP + options.steps]
    kernels.show()
    used = rows[WARM_UP * options.accumulate :]
    lengths = [length for row in used[: options.steps * options.accumulate] for length in row.lengths]
    flops = count_model_flops(model.causal).count(lengths) / sum(lengths)
    rate = statistics.median(step.tokens_per_s for step in log)
    peak = options.peak or find_device_peak(torch.device("cuda"))
    return {
        "shape": options.shape,
        "method": options.method,
        "packing": model.packing,
        "tokens": options.tokens,
        "accumulate": options.accumulate,
        "checkpoint": options.checkpoint,
        "in_backward": options.in_backward,
        "precision": options.precision,
        "layers_recomputed": model.checkpoints.count if model.checkpoints is not None else 0,
        "compiled": not options.eager,
        "useful_tokens_per_s": round(rate),
        "mfu": round(rate * flops / peak, 4) if peak else None,
        "step_s": round(sum(lengths) / options.steps / rate, 4),
        "loading_gb": loading_gb,
        "peak_gb": round(max(step.memory_bytes for step in log) / 1e9, 1),
        "fill": round(sum(lengths) / (options.steps * options.accumulate * options.tokens), 4),
        "loss": round(log[-1].loss or 0.0, 3),
        "attention": name_attention(options.shape),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def name_attention(shape: str) -> str:
    """Whose kernels the shape's packed attention takes on this GPU."""
    width, _, heads, *_ = SHAPES[shape]
    if not attends_at_once(torch.device("cuda"), torch.bfloat16):
        return "scaled dot-product, one conversation after another"
    if has_flash_attention(0) and serves_width(width // heads, 0):
        return "FlashAttention 4"
    return "PyTorch's varlen_attn (FlashAttention 2)"


def choose_rows(options: argparse.Namespace) -> list[PackedRow]:
    """Full rows enough for the steps, the warm-up, and one that is profiled."""
    count = (options.steps + WARM_UP + 1) * options.accumulate
    rows = pack_rows(load_sequences(options.data, count * options.tokens // 600), options.tokens, seed=0)
    full = [row for row in rows if len(row.ids_T) > 0.97 * options.tokens]
    return full[:count]


class StepProfile:
    """Kernels by their time, of the step after number `after`."""

    def __init__(self, after: int | None) -> None:
        self._after = after
        self._profile: Any = None

    def step_done(self, step: StepReport) -> None:
        if step.step == 1:
            print(f"first step: loss {step.loss:.3f}", flush=True)
        if self._after is not None and step.step == self._after:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()
        elif self._profile is not None and step.step == self._after + 1:
            torch.cuda.synchronize()
            self._profile.stop()

    def show(self) -> None:
        if self._profile is None:
            return
        events = sorted(self._profile.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events)
        print(f"kernels of one step: {total / 1e3:.1f} ms")
        for event in events[:40]:
            print(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6d}  {event.key[:100]}")


if __name__ == "__main__":
    main()
