"""What `chaccu weights` costs on a LLaMA of 2.7 GB with random weights: seconds and the peak of memory, beside `cp`.

    python benchmarks/bench_weights.py --scratch DIR [--parts delta-make merge …]

Each command is a process of its own, and so is each `cp`, which ends with fsync as the commands do; files are in the cache.
`cp_all` copies what the command reads and writes, `cp_result` what it writes alone. The peak is the kernel's count of resident
memory (ru_maxrss); its bound is three times the largest tensor and 500 MB. Needs 14 GB in DIR. Writes `results/weights.json`;
parts that are not asked for keep the figures that they have there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from machine import RESULTS, describe_machine, write_results

# Hidden width, layers, heads, width of the feed-forward part, vocabulary: 1.35 billion weights.
SHAPE = (2048, 24, 16, 5504, 32000)
MAX_SHARD_BYTES = 1_000_000_000
FILE = RESULTS / "weights.json"
CHACCU = [sys.executable, "-m", "chaccu.cli.main", "weights"]


def write_model(folder: Path, like: Path | None) -> None:
    """A random LLaMA in bfloat16, or one that has moved a little from `like`; tensor by tensor."""
    import torch
    from random_llama import write_tokenizer

    from chaccu.weights.checkpoint import Checkpoint, plan_shards, write_checkpoint
    from chaccu.weights.safetensors_file import TensorSpec

    width, layers, heads, inner, vocabulary = SHAPE
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        shapes |= {f"{stem}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{stem}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{stem}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{stem}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    before = None if like is None else Checkpoint(like)
    torch.manual_seed(0 if like is None else 1)

    def draw(name: str) -> torch.Tensor:
        values = torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.03, 0.03)
        return values if before is None else before.read(name).add_(values, alpha=0.02)

    folder.mkdir(parents=True)
    write_checkpoint(folder, specs, draw, shards=plan_shards(specs, MAX_SHARD_BYTES))
    write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_adapter(folder: Path) -> None:
    """A random LoRA adapter of rank 16 of every linear layer, in PEFT's form."""
    import torch
    from safetensors.torch import save_file

    width, layers, _, inner, _ = SHAPE
    linear = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    linear |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    torch.manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for name, (rows, columns) in linear.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(16, columns) * 0.01
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 16) * 0.01
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": sorted(linear)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_pickles(folder: Path, model: Path) -> None:
    """`model` as it would be with PyTorch's pickles for its shards."""
    import torch

    from chaccu.weights.safetensors_file import SafetensorsFile

    folder.mkdir(parents=True)
    shards = sorted(model.glob("*.safetensors"))
    for at, path in enumerate(shards, 1):
        file = SafetensorsFile(path)
        torch.save({name: file.read(name) for name in file.entries}, folder / f"pytorch_model-{at:05}-of-{len(shards):05}.bin")
    for path in model.glob("*.json"):
        if not path.name.startswith("model.safetensors"):
            shutil.copy(path, folder)


def run(command: Sequence[str]) -> dict[str, Any]:
    """Seconds and the peak of memory. This process must be small: the kernel counts its size as the child's before `exec`."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{said[-3000:]}")
    return {
        "wall_s": round(time.monotonic() - begun, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def copy(folders: Sequence[Path], scratch: Path) -> float:
    """Seconds of `cp` with fsync."""
    target = scratch / "copy"
    target.mkdir()
    script = 'cp -r "$@" && find "${@: -1}" -type f -print0 | xargs -0 sync'
    took = run(["bash", "-c", script, "bash", *map(str, folders), str(target)])
    shutil.rmtree(target)
    return float(took["wall_s"])


def warm(folders: Sequence[Path]) -> None:
    """Into the page cache, without memory of this process's own."""
    for file in sorted(file for folder in folders for file in folder.rglob("*") if file.is_file()):
        subprocess.run(["cp", str(file), "/dev/null"], check=True)


class Bench:
    """The models in `scratch`, each made when it is first asked for, and what was measured."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        width, _, _, _, vocabulary = SHAPE
        self.bound_bytes = 3 * 2 * width * vocabulary + 500_000_000

    @property
    def base(self) -> Path:
        return self._model("base", None)

    @property
    def tuned(self) -> Path:
        return self._model("tuned", self.base)

    @property
    def adapter(self) -> Path:
        folder = self.scratch / "adapter"
        if not folder.is_dir():
            subprocess.run([sys.executable, __file__, "--make-adapter", str(folder)], check=True)
        return folder

    def _model(self, name: str, like: Path | None) -> Path:
        folder = self.scratch / name
        if not folder.is_dir():
            command = [sys.executable, __file__, "--make", str(folder), *(["--like", str(like)] if like else [])]
            subprocess.run(command, check=True)
        return folder

    def measure(self, arguments: Sequence[str], reads: Sequence[Path], out: Path) -> dict[str, Any]:
        """One command, three times, the fastest; and what copying takes."""
        warm(reads)
        runs = []
        for _ in range(3):
            shutil.rmtree(out, ignore_errors=True)
            runs.append(run([*CHACCU, *arguments, "--out", str(out)]))
        took = min(runs, key=lambda one: float(one["wall_s"]))
        took["peak_bytes"] = max(one["peak_bytes"] for one in runs)
        copies = {"cp_all_s": [*reads, out], "cp_result_s": [out]}
        took |= {name: min(copy(folders, self.scratch) for _ in range(3)) for name, folders in copies.items()}
        took["times_cp_all"] = round(took["wall_s"] / took["cp_all_s"], 2)
        took["times_cp_result"] = round(took["wall_s"] / took["cp_result_s"], 2)
        return {**took, "bound_bytes": self.bound_bytes}


def delta_make(bench: Bench) -> dict[str, Any]:
    """The tuned model minus the base."""
    arguments = ["delta-make", "--base", str(bench.base), "--target", str(bench.tuned)]
    return bench.measure(arguments, [bench.base, bench.tuned], bench.scratch / "delta")


def delta_apply(bench: Bench) -> dict[str, Any]:
    """And back, byte for byte."""
    delta, out = bench.scratch / "delta", bench.scratch / "applied"
    if not delta.is_dir():
        delta_make(bench)
    found = bench.measure(["delta-apply", "--base", str(bench.base), "--delta", str(delta)], [bench.base, delta], out)
    for file in sorted(bench.tuned.glob("*.safetensors")):
        subprocess.run(["cmp", str(file), str(out / file.name)], check=True)
    shutil.rmtree(out)
    return found


def average(bench: Bench) -> dict[str, Any]:
    """The mean of base and tuned model."""
    out = bench.scratch / "mean"
    found = bench.measure(["average", str(bench.base), str(bench.tuned)], [bench.base, bench.tuned], out)
    shutil.rmtree(out)
    return found


def merge(bench: Bench) -> dict[str, Any]:
    """An adapter of rank 16 of every linear layer into the base."""
    out = bench.scratch / "merged"
    arguments = ["merge", "--base", str(bench.base), "--adapter", str(bench.adapter)]
    found = bench.measure(arguments, [bench.base, bench.adapter], out)
    shutil.rmtree(out)
    return found


def quantize_nf4(bench: Bench) -> dict[str, Any]:
    """The base into bitsandbytes' four bits."""
    return _quantize(bench, "nf4", keep=True)


def merge_nf4(bench: Bench) -> dict[str, Any]:
    """The adapter into the base in four bits, which becomes one in bfloat16."""
    packed, out = bench.scratch / "base-nf4", bench.scratch / "merged-nf4"
    if not packed.is_dir():
        quantize_nf4(bench)
    arguments = ["merge", "--base", str(packed), "--adapter", str(bench.adapter)]
    found = bench.measure(arguments, [packed, bench.adapter], out)
    shutil.rmtree(out)
    return found


def quantize_fp8(bench: Bench) -> dict[str, Any]:
    """The base into vLLM's eight bits."""
    return _quantize(bench, "fp8", keep=False)


def _quantize(bench: Bench, kind: str, *, keep: bool) -> dict[str, Any]:
    out = bench.scratch / f"base-{kind}"
    found = bench.measure(["quantize", str(bench.base), "--type", kind, "--no-measure"], [bench.base], out)
    if not keep:
        shutil.rmtree(out)
    return found


def convert(bench: Bench) -> dict[str, Any]:
    """The base in float16."""
    return _convert(bench, ["--dtype", "f16"])


def convert_gguf(bench: Bench) -> dict[str, Any]:
    """The base as a GGUF file of float16."""
    return _convert(bench, ["--to", "gguf", "--type", "f16", "--format", "chatml"])


def _convert(bench: Bench, options: list[str]) -> dict[str, Any]:
    out = bench.scratch / "converted"
    found = bench.measure(["convert", str(bench.base), *options], [bench.base], out)
    shutil.rmtree(out)
    return found


def repair(bench: Bench) -> dict[str, Any]:
    """A folder with pickled shards into one with safetensors."""
    pickled, out = bench.scratch / "pickled", bench.scratch / "mended"
    if not pickled.is_dir():
        subprocess.run([sys.executable, __file__, "--make", str(pickled), "--pickle", str(bench.base)], check=True)
    found = bench.measure(["repair", str(pickled)], [pickled], out)
    shutil.rmtree(pickled)
    shutil.rmtree(out)
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "delta-make": delta_make,
    "delta-apply": delta_apply,
    "average": average,
    "convert": convert,
    "convert-gguf": convert_gguf,
    "repair": repair,
    "merge": merge,
    "quantize-nf4": quantize_nf4,
    "merge-nf4": merge_nf4,
    "quantize-fp8": quantize_fp8,
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for the models; what lies there from before is used")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--like", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make-adapter", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pickle", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make and options.pickle:
        write_pickles(options.make, options.pickle)
        return
    if options.make_adapter:
        write_adapter(options.make_adapter)
        return
    if options.make:
        write_model(options.make, options.like)
        return
    if options.scratch is None:
        parser.error("--scratch is needed")
    bench = Bench(options.scratch)
    known = json.loads(FILE.read_text(encoding="utf-8"))["parts"] if FILE.is_file() else {}
    machine = describe_machine("chaccu", "torch", "numpy", "safetensors")
    for name in options.parts:
        measured = {**PARTS[name](bench), "date": machine["date"], "commit": machine["commit"]}
        known[name] = measured
        print(json.dumps({name: measured}), flush=True)
    weights = sum(file.stat().st_size for file in bench.base.glob("*.safetensors"))
    write_results({"machine": machine, "model_bytes": weights, "parts": known}, FILE)


if __name__ == "__main__":
    main()
