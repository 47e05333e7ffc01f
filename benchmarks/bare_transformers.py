"""The engine `transformers` asked in its own process, with no gateway between: what the GPU serving bench compares with.

    python benchmarks/bare_transformers.py FOLDER --clients 1 16 64 --prompt-tokens 128 --max-tokens 128

FOLDER is one of `random_llama.py`. Prints a JSON line of figures for each number of clients. `--peer` asks transformers' own
continuous batching instead, each wave of as many prompts as there are clients at once; it has no times to first tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from closed_loop import Pieces, measure_levels
from random_llama import CHAT_FORMAT, choose_prompt

from chaccu.conversation import TextTokenizer
from chaccu.engine.model_source import resolve_model
from chaccu.engine.protocol import EngineOptions, GenerationRequest
from chaccu.engine.transformers import TransformersEngine


async def measure(options: argparse.Namespace) -> None:
    """Of the engine."""
    source = resolve_model(str(options.folder), chat_format=CHAT_FORMAT)
    tokenizer = TextTokenizer.load(options.folder)
    engine = TransformersEngine.load(source, EngineOptions(slots=max(options.clients)))

    async def ask(number: int, length: int) -> Pieces:
        [prompt_ids] = tokenizer.encode_texts([choose_prompt(number, options.prompt_tokens)], first=[True])
        request = GenerationRequest(id=str(number), prompt_ids=prompt_ids, max_tokens=length, temperature=0)
        async for delta in engine.generate(request):
            yield delta.tokens

    async for figures in measure_levels(ask, options.clients, max_tokens=options.max_tokens):
        print(json.dumps(figures), flush=True)
    await engine.close()


def measure_peer(options: argparse.Namespace) -> None:
    """Of transformers' own manager."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype).to(device).eval()
    for clients in options.clients:
        for length in (8, options.max_tokens):
            config = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=-1, pad_token_id=0)
            tokens, begun = 0, time.perf_counter()
            for wave in range(2):
                prompts = [choose_prompt(2 * one + wave, options.prompt_tokens) for one in range(clients)]
                outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
                tokens += sum(len(output.generated_tokens) for output in outputs.values())
            seconds = time.perf_counter() - begun
        figures = {"clients": clients, "questions": 2 * clients, "tokens": tokens, "seconds": round(seconds, 3)}
        print(json.dumps({**figures, "tokens_per_s": round(tokens / seconds, 1)}), flush=True)


def main() -> None:
    """Measure and print."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path)
    cli.add_argument("--clients", type=int, nargs="+", required=True)
    cli.add_argument("--prompt-tokens", type=int, required=True)
    cli.add_argument("--max-tokens", type=int, required=True)
    cli.add_argument("--peer", action="store_true")
    options = cli.parse_args()
    if options.peer:
        measure_peer(options)
    else:
        asyncio.run(measure(options))


if __name__ == "__main__":
    main()
