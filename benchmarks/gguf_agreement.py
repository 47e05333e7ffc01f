"""How a real model fares as GGUF: llama.cpp's probabilities and ids against transformers', and what the export takes.

    python benchmarks/gguf_agreement.py runs/demo/base --type f16 --out results/gguf-agreement.json

The prompts are beginnings of generated texts (words, scripts, code, spaces); the likeliest tokens of llama.cpp, a thousand a
prompt, are compared. A result names its machine and versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from chaccu.artifact import library_versions, write_json

_TOP = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--type", default="f16")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = measure(options.folder, Path(work) / "gguf", options.type, options.prompts, options.texts)
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, result)


def measure(folder: Path, out: Path, kind: str, prompt_count: int, text_count: int) -> dict[str, Any]:
    """Export, then compare."""
    from chaccu.weights.gguf_export import export_gguf

    begin = time.perf_counter()
    manifest = export_gguf(folder, out, kind=kind)
    seconds = time.perf_counter() - begin
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.perf_counter()
    (out / "copy").write_bytes((folder / "model.safetensors").read_bytes())
    copy_seconds = time.perf_counter() - begin
    (out / "copy").unlink()
    return {
        "model": manifest.name,
        "type": kind,
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": library_versions("torch", "transformers", "xllamacpp", "gguf"),
        "export": {"seconds": seconds, "copy_seconds": copy_seconds, "peak_bytes": peak_bytes},
        **compare(folder, out / "model.gguf", prompt_count, text_count),
    }


def compare(folder: Path, gguf: Path, prompt_count: int, text_count: int) -> dict[str, Any]:
    import torch
    import transformers

    from chaccu.testing.generated_texts import draw_texts
    from chaccu.testing.llama_logits import LlamaLogits

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    texts = draw_texts(text_count)
    plain = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    named = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [tokenizer(text)["input_ids"][:32] for text in texts[:prompt_count]]
    with LlamaLogits(gguf) as llama:
        same = sum(one == other for one, other in zip(llama.tokenize(texts), plain, strict=True))
        same_named = sum(one == other for one, other in zip(llama.tokenize(texts, special=True), named, strict=True))
        theirs = [llama.next_logprobs(prompt, len(tokenizer), top=_TOP) for prompt in prompts]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cosines, agreed = [], 0
    with torch.inference_mode():
        for prompt, found in zip(prompts, theirs, strict=True):
            ours = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).numpy()[: len(found)]
            agreed += int(ours.argmax() == found.argmax())
            told = np.isfinite(found)
            one, other = (values[told] - values[told].mean() for values in (ours, found))
            cosines.append(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))
    return {
        "texts": len(texts),
        "same_ids": same,
        "same_ids_with_control_tokens": same_named,
        "prompts": len(prompts),
        "same_likeliest": agreed,
        "cosine": {"least": min(cosines), "mean": float(np.mean(cosines))},
    }


if __name__ == "__main__":
    main()
