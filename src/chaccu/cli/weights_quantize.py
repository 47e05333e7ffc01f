"""`chaccu weights quantize`: a model in fewer bits, and what that costs."""

from __future__ import annotations

import asyncio
import time
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chaccu.cli.progress_bar import counting

if TYPE_CHECKING:
    from chaccu.weights.quantize import Measured


def register(app: typer.Typer) -> None:
    """Add the command to `chaccu weights`."""
    app.command("quantize", epilog="Example: chaccu weights quantize runs/demo/base --type nf4 --out runs/demo/base-nf4")(
        quantize_command
    )


def quantize_command(
    source: Annotated[
        str, typer.Argument(help="A Hugging Face folder or hub id; for a GGUF type also a GGUF file or its folder.")
    ],
    kind: Annotated[
        str, typer.Option("--type", help="q8_0, q6_k, q5_k_m, q5_0, q4_k_m or q4_0 for llama.cpp; nf4, int8; fp8 for vLLM.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it appears once it is whole.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to measure perplexity on, in UTF-8; left out: some 27 kB of Chaccu's own pages.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure perplexity and speed before and after.")] = True,
    max_shard_bytes: Annotated[int | None, typer.Option(min=1, help="Most bytes of a file of weights; left out: 5 GB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as one JSON object.")] = False,
) -> None:
    """Write a model in fewer bits, and say what it gained and lost: bytes, perplexity on a held-out text, tokens a second."""
    import msgspec

    from chaccu.errors import WeightsError
    from chaccu.weights.checkpoint import MAX_SHARD_BYTES
    from chaccu.weights.perplexity import read_text
    from chaccu.weights.quantize import Measured, check_type, find_source, measure_size, quantize

    check_type(kind)
    held_out = read_text(text)
    found = find_source(source, kind)
    limit = MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    with counting("quantising") as progress:
        manifest = quantize(found, out, kind, max_shard_bytes=limit, progress=progress)
    made = out / "model.gguf" if manifest.kind == "gguf" else out
    try:
        before, after = (
            _measure(model, held_out, when) if measure else Measured(measure_size(model))
            for model, when in ((found, "before"), (made, "after"))
        )
    except WeightsError as error:
        raise WeightsError(f"{out} is written, and could not be measured: {error.message}", remedy="--no-measure") from error
    if as_json:
        report = {"type": kind, "out": str(out), "settings": manifest.settings, "before": before, "after": after}
        typer.echo(msgspec.json.encode(report).decode())
        return
    typer.echo(f"{out}: {manifest.kind}, {kind}")
    for when, measured in (("before", before), ("after", after)):
        typer.echo(f"{when:>6}: {_describe(measured)}")
    if measure:
        typer.echo(f"perplexity by {after.measured_by}")


def _measure(model: Path, text: str, when: str) -> Measured:
    import msgspec

    from chaccu.weights.quantize import measure_model

    with counting(f"measuring {when}") as progress:
        measured = measure_model(model, text, progress=progress)
    if model.is_file() and util.find_spec("xllamacpp") is not None:
        return msgspec.structs.replace(measured, tokens_per_s=asyncio.run(_time_llama_cpp(model)))
    return measured


async def _time_llama_cpp(model: Path) -> float:
    """Tokens a second that llama.cpp generates, one answer at a time; the first token, which waits for the prompt, is not
    counted.
    """
    from chaccu.engine.llamacpp import LlamaCppEngine
    from chaccu.engine.model_source import ModelSource
    from chaccu.engine.protocol import EngineOptions, GenerationRequest
    from chaccu.weights.perplexity import SPEED_PROMPT, TIMED_TOKENS

    source = ModelSource(spec=str(model), name=model.stem, chat_format="chatml", folder=model.parent, gguf=model)
    engine: Any = await asyncio.to_thread(LlamaCppEngine.load, source, EngineOptions(slots=1, context_tokens=512))
    try:
        request = GenerationRequest(id="speed", prompt_ids=SPEED_PROMPT, max_tokens=TIMED_TOKENS, temperature=0.0)
        began, tokens = 0.0, 0
        async for delta in engine.generate(request):
            if not began:
                began = time.perf_counter()
            else:
                tokens += delta.tokens
        return tokens / max(time.perf_counter() - began, 1e-9)
    finally:
        await engine.close()


def _describe(measured: Measured) -> str:
    text = f"{measured.size_bytes / 1e6:,.1f} MB"
    if measured.perplexity is not None:
        found = measured.perplexity
        text += f", perplexity {found.perplexity:.3f} ({found.bits_per_byte:.4f} bits a byte, {found.tokens:,} tokens)"
    if measured.tokens_per_s is not None:
        text += f", {measured.tokens_per_s:.1f} tokens/s"
    return text
