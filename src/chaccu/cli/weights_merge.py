"""`chaccu weights merge`: an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chaccu.cli.progress_bar import counting


def register(app: typer.Typer) -> None:
    """Add the command to `chaccu weights`."""
    app.command(
        "merge", epilog="Example: chaccu weights merge --base runs/demo/base --adapter runs/demo/adapter --out runs/demo/merged"
    )(merge_command)


def merge_command(
    base: Annotated[str, typer.Option(help="The base model: a Hugging Face folder, in nf4 too, or a hub id.")],
    adapter: Annotated[str, typer.Option(help="The LoRA adapter: a folder in PEFT's form, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it appears once it is whole.")],
    gguf: Annotated[
        Path | None, typer.Option(help="The GGUF file that base came from: write a GGUF folder for the CPU engine.")
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Pack the merged weights of an nf4 base into nf4 again, at a loss that is stated."),
    ] = False,
    max_shard_bytes: Annotated[int | None, typer.Option(min=1, help="Most bytes of a file of weights; left out: 5 GB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON object.")] = False,
) -> None:
    """Merge a LoRA adapter into its base, and say how much of it the rounding takes away."""
    import msgspec

    from chaccu.errors import UsageError
    from chaccu.weights.checkpoint import MAX_SHARD_BYTES
    from chaccu.weights.gguf_merge import merge_into_gguf
    from chaccu.weights.merge import merge_adapter
    from chaccu.weights.merge_error import MergeError

    if gguf is not None and (requantize or max_shard_bytes is not None):
        raise UsageError(
            "--requantize and --max-shard-bytes are for a Hugging Face folder.", remedy="leave them out with --gguf"
        )
    with counting("merging") as progress:
        if gguf is not None:
            manifest = merge_into_gguf(gguf, base, adapter, out, progress=progress)
        else:
            limit = MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
            manifest = merge_adapter(base, adapter, out, max_shard_bytes=limit, requantize=requantize, progress=progress)
    if as_json:
        typer.echo(msgspec.json.encode(manifest).decode())
        return
    typer.echo(f"{out}: {manifest.kind}, {manifest.settings['adapted_weights']} weights merged")
    typer.echo(msgspec.convert(manifest.facts["merge_error"], MergeError).describe())
