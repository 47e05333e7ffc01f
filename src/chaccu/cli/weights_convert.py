"""`chaccu weights convert | adapter-gguf | wrap`: between Hugging Face folders and GGUF files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chaccu.cli.progress_bar import counting

if TYPE_CHECKING:
    from chaccu.artifact import Manifest

_Out = Annotated[Path, typer.Option(help="Folder to write; it appears once it is whole.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print the new folder's manifest as JSON.")]


class Target(StrEnum):
    """What convert writes."""

    hf = "hf"
    gguf = "gguf"


class GgufType(StrEnum):
    """ggml's types that need no measuring."""

    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"
    q8_0 = "q8_0"


class Dtype(StrEnum):
    """torch's dtypes of a Hugging Face folder."""

    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"


_TORCH_NAMES = {Dtype.bf16: "bfloat16", Dtype.f16: "float16", Dtype.f32: "float32"}


def register(app: typer.Typer) -> None:
    """Add the commands to `chaccu weights`."""
    app.command(
        "convert",
        epilog="Example: chaccu weights convert runs/demo/merged --to gguf --type q8_0 --out runs/demo/merged-gguf",
    )(convert_command)
    app.command(
        "adapter-gguf",
        epilog="Example: chaccu weights adapter-gguf runs/demo/adapter --base runs/demo/base --out runs/demo/adapter-gguf",
    )(adapter_gguf_command)
    app.command("wrap", epilog="Example: chaccu weights wrap gemma.gguf --base runs/demo/base --out runs/demo/base-gguf")(
        wrap_command
    )


def convert_command(
    source: Annotated[str, typer.Argument(help="A GGUF file, or a Hugging Face folder or hub id.")],
    out: _Out,
    to: Annotated[Target, typer.Option(help="What to write.")] = Target.hf,
    kind: Annotated[GgufType | None, typer.Option("--type", help="With --to gguf: of the matrices; left out: f16.")] = None,
    chat_format: Annotated[
        str | None, typer.Option("--format", help="Chat format that the model is to use, where its manifest names none.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of a Hugging Face folder; left out: the source's, and bf16 from a GGUF file.")
    ] = None,
    max_shard_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of tensors in one safetensors file.")] = 5_000_000_000,
    as_json: _AsJson = False,
) -> None:
    """Convert a model: GGUF to Hugging Face, Hugging Face to GGUF, or to another dtype or file size.

    A model whose tokenizer would give other ids than in training is not written.
    """
    from chaccu.conversation import TOKENIZER_FORMAT, load_format
    from chaccu.errors import UsageError, WeightsError
    from chaccu.hub import find_model_folder

    if chat_format not in (None, TOKENIZER_FORMAT):
        chat_format = load_format(chat_format).name
    path = Path(source).expanduser()
    if path.is_file():
        if to is Target.gguf:
            raise UsageError(f"{path} is a GGUF file.", remedy="leave --to gguf out, or name a Hugging Face folder")
        if chat_format is None:
            raise UsageError("a GGUF file names no chat format.", remedy="--format NAME (chaccu format list)")
        _import(path, out, chat_format, dtype or Dtype.bf16, max_shard_bytes, as_json=as_json)
        return
    if to is Target.gguf and dtype is not None:
        raise UsageError("--dtype is of a Hugging Face folder.", remedy="give --type with --to gguf")
    if to is Target.hf and kind is not None:
        raise UsageError("--type is of a GGUF file.", remedy="give --dtype, or --to gguf")
    folder = find_model_folder(source, error=WeightsError)
    with counting("writing") as progress:
        if to is Target.gguf:
            from chaccu.weights.gguf_export import export_gguf

            manifest = export_gguf(folder, out, kind=(kind or GgufType.f16).value, chat_format=chat_format, progress=progress)
        else:
            from chaccu.weights.recast import recast_model

            manifest = recast_model(
                folder,
                out,
                dtype=dtype.value if dtype else None,
                max_shard_bytes=max_shard_bytes,
                chat_format=chat_format,
                progress=progress,
            )
    for difference in manifest.facts.get("tokenizer_differences", []):
        typer.echo(f"note: {difference}", err=True)
    _report(manifest, out, as_json=as_json)


def _import(source: Path, out: Path, chat_format: str, dtype: Dtype, max_shard_bytes: int, *, as_json: bool) -> None:
    from chaccu.artifact import MANIFEST_NAME, read_manifest, sha256_file
    from chaccu.weights.gguf_import import import_gguf

    name = _TORCH_NAMES[dtype]
    if (out / MANIFEST_NAME).is_file():
        found = read_manifest(out, kind="base")
        same = found.chat_format == chat_format and found.settings.get("dtype") == name
        if same and sha256_file(source) in found.inputs.values():
            typer.echo(f"{out} is there already, made from this file.", err=as_json)
            if as_json:
                _report(found, out, as_json=True)
            return
    with counting("unpacking") as progress:
        manifest = import_gguf(
            source, out, chat_format=chat_format, dtype=name, max_shard_bytes=max_shard_bytes, progress=progress
        )
    _report(manifest, out, as_json=as_json)


def adapter_gguf_command(
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter folder.")],
    out: _Out,
    gguf: Annotated[Path | None, typer.Option(help="A GGUF file of the base.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The base's Hugging Face folder or hub id: in place of --gguf, or beside it to compare manifests."),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Write a LoRA adapter as llama.cpp takes it beside its base: chaccu worker --adapter NAME=OUT."""
    from chaccu.errors import UsageError, WeightsError
    from chaccu.hub import find_model_folder
    from chaccu.weights.adapter_gguf import write_adapter_gguf

    if gguf is None and base is None:
        raise UsageError("the base of the adapter is not named.", remedy="--base FOLDER, or --gguf FILE")
    folder = find_model_folder(base, error=WeightsError) if base is not None else None
    manifest = write_adapter_gguf(adapter, gguf, out, base=folder)
    _report(manifest, out, as_json=as_json)


def wrap_command(
    source: Annotated[Path, typer.Argument(help="A GGUF file.")],
    base: Annotated[Path, typer.Option(help="The folder that weights convert made of it.")],
    out: _Out,
) -> None:
    """Make an unchanged GGUF file a model folder that the CPU engine serves."""
    from chaccu.weights.gguf_merge import wrap_gguf

    wrap_gguf(source, base, out)
    typer.echo(f"{out} can be served")


def _report(manifest: Manifest, out: Path, *, as_json: bool) -> None:
    import msgspec

    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(manifest), indent=2).decode())
        return
    size = sum(entry.size_bytes for entry in manifest.files.values())
    typer.echo(f"{out}: {manifest.name}, {manifest.kind}, {size / 1e6:,.1f} MB")
