"""The engine `transformers` asked in its own process, with no gateway between: what the GPU serving bench compares with.

    python benchmarks/bare_transformers.py FOLDER --clients 1 16 64 --prompt-tokens 128 --max-tokens 128

FOLDER is one of `random_llama.py`. Prints a JSON line of figures for each number of clients. `--peer` asks transformers' own
continuous batching instead, on a GPU: it takes most of what memory is free for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
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


async def measure_peer(options: argparse.Namespace) -> None:
    """Of transformers' own manager."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = TextTokenizer.load(options.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16).cuda().eval()
    config = GenerationConfig(max_new_tokens=options.max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(generation_config=config) as manager:

        async def ask(number: int, length: int) -> Pieces:
            [prompt_ids] = tokenizer.encode_texts([choose_prompt(number, options.prompt_tokens)], first=[True])
            outputs: asyncio.Queue[Any] = asyncio.Queue()
            manager.register_result_handler(str(number), outputs.put_nowait)
            manager.add_request(prompt_ids, request_id=str(number), max_new_tokens=length, streaming=True)
            told, ended = 0, False
            while not ended:
                output = await outputs.get()
                if output.error is not None:
                    raise RuntimeError(output.error)
                yield len(output.generated_tokens) - told
                told, ended = len(output.generated_tokens), output.is_finished()

        async for figures in measure_levels(ask, options.clients, max_tokens=options.max_tokens):
            print(json.dumps(figures), flush=True)


def main() -> None:
    """Measure and print."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path)
    cli.add_argument("--clients", type=int, nargs="+", required=True)
    cli.add_argument("--prompt-tokens", type=int, required=True)
    cli.add_argument("--max-tokens", type=int, required=True)
    cli.add_argument("--peer", action="store_true")
    options = cli.parse_args()
    asyncio.run(measure_peer(options) if options.peer else measure(options))


if __name__ == "__main__":
    main()
