"""`chaccu weights delta-make`, `delta-apply`, `average` and `extract`: models out of the differences between models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chaccu.cli.progress_bar import counting

if TYPE_CHECKING:
    from chaccu.weights.extract import ExtractReport

_Out = Annotated[Path, typer.Option(help="Folder to write; it appears once it is whole.")]
_Base = Annotated[str, typer.Option(help="The base model: a Hugging Face folder or hub id.")]
_MaxShardBytes = Annotated[
    int | None, typer.Option(min=1, help="The most that one file of weights may have; left out: files as the model's.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to `chaccu weights`."""
    app.command(
        "delta-make", epilog="Example: chaccu weights delta-make --base llama-7b --target runs/vicuna --out runs/vicuna-delta"
    )(delta_make_command)
    app.command(
        "delta-apply", epilog="Example: chaccu weights delta-apply --base llama-7b --delta runs/vicuna-delta --out runs/vicuna"
    )(delta_apply_command)
    app.command("average", epilog="Example: chaccu weights average runs/one runs/two --weight 2 --weight 1 --out runs/mean")(
        average_command
    )
    app.command(
        "extract", epilog="Example: chaccu weights extract --base llama-7b --tuned runs/vicuna --rank 64 --out runs/vicuna-lora"
    )(extract_command)


def delta_make_command(
    base: _Base,
    target: Annotated[str, typer.Option(help="The model to pass on: a Hugging Face folder or hub id.")],
    out: _Out,
    max_shard_bytes: _MaxShardBytes = None,
) -> None:
    """Write a model as its difference from its base, which gives it back bit for bit."""
    from chaccu.weights.delta import make_delta
    from chaccu.weights.model_files import find_model

    with counting("subtracting") as progress:
        manifest = make_delta(
            find_model(base),
            find_model(target),
            out,
            base_name=_hub_name(base),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    tensors = manifest.facts["tensors"].values()
    whole = sum(tensor["base"] is None for tensor in tensors)
    typer.echo(
        f"{out}: {len(tensors)} tensors, {manifest.facts['unchanged']} of them unchanged, {whole} whole; "
        f"{len(manifest.facts['dropped'])} of the base dropped"
    )


def delta_apply_command(
    base: _Base,
    delta: Annotated[
        str, typer.Option(help="What delta-make wrote, or a folder of float differences as FastChat released; or a hub id.")
    ],
    out: _Out,
    max_shard_bytes: _MaxShardBytes = None,
) -> None:
    """Make a model of its base and its delta, and check both."""
    from chaccu.artifact import MANIFEST_NAME
    from chaccu.weights.delta import apply_delta
    from chaccu.weights.float_delta import apply_float_delta
    from chaccu.weights.model_files import find_model

    folder = find_model(delta, pickled=True)
    named = (folder / MANIFEST_NAME).is_file()
    with counting("adding") as progress:
        apply = apply_delta if named else apply_float_delta
        manifest = apply(find_model(base, pickled=not named), folder, out, max_shard_bytes=max_shard_bytes, progress=progress)
    if not named:
        typer.echo(
            f"{delta} has no manifest.json: its floats were added to the base's, whose shapes alone could be checked.", err=True
        )
    verdict = "each with the SHA-256 that it had" if named else "all finite"
    typer.echo(f"{out}: {manifest.facts['tensors']} tensors, {verdict}")


def average_command(
    models: Annotated[list[str], typer.Argument(help="Two or more models: Hugging Face folders or hub ids.")],
    out: _Out,
    weight: Annotated[
        list[float] | None, typer.Option(help="How much a model counts, once for each in their order; left out: all alike.")
    ] = None,
    max_shard_bytes: _MaxShardBytes = None,
) -> None:
    """Write the weighted mean of checkpoints of one model."""
    from chaccu.weights.average import average_models
    from chaccu.weights.model_files import find_model

    with counting("averaging") as progress:
        folders = [find_model(model) for model in models]
        manifest = average_models(folders, out, weights=weight, max_shard_bytes=max_shard_bytes, progress=progress)
    shares = ", ".join(f"{share:.1%}" for share in manifest.settings["weights"].values())
    typer.echo(f"{out}: the mean of {len(models)} models ({shares})")


def extract_command(
    base: _Base,
    tuned: Annotated[str, typer.Option(help="The model that was trained from it: a Hugging Face folder or hub id.")],
    out: _Out,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every layer's factors.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="In place of --rank: the smallest rank that keeps this share of the layers' change, 0 to 1."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse when embeddings, norms, settings or the tokenizer have changed too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Make a LoRA adapter of what a model's training changed, and say how much of it the adapter keeps."""
    import msgspec

    from chaccu.errors import UsageError
    from chaccu.weights.extract import choose_rank, extract_adapter, require_nothing_lost
    from chaccu.weights.model_comparison import Comparison
    from chaccu.weights.model_files import find_model

    if (rank is None) == (energy is None):
        raise UsageError("extract needs either --rank or --energy.", remedy="--rank 64, or --energy 0.9")
    with counting("comparing") as progress:
        comparison = Comparison(find_model(base), find_model(tuned), progress=progress)
    if strict:
        require_nothing_lost(comparison)
    if energy is not None:
        with counting("choosing a rank") as progress:
            rank = choose_rank(comparison, energy, progress=progress)
    assert rank is not None
    with counting("factorising") as progress:
        _, report = extract_adapter(comparison, rank, out, base_name=_hub_name(base), progress=progress)
    typer.echo(msgspec.json.encode(report).decode() if as_json else _show_report(report, out))


def _hub_name(model: str) -> str | None:
    """What a model is called where it was named by its hub id; the folder of its copy says nothing."""
    return None if Path(model).expanduser().is_dir() else model


def _show_report(report: ExtractReport, out: Path) -> str:
    rows = [
        (one.module, str(one.layers), f"{one.share:.2%}", f"{one.energy_kept:.4%}")
        for one in sorted(report.modules, key=lambda one: -one.share)
    ]
    rows += [(one.kind, str(len(one.tensors)), f"{one.share:.2%}", "none") for one in report.lost]
    titles = ("part", "tensors", "share of the change", "energy kept")
    widths = [max(len(row[at]) for row in (titles, *rows)) for at in range(len(titles))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (titles, *rows)]
    lines += [f"also: {difference}" for difference in report.differences]
    return "\n".join(
        [
            *lines,
            f"{out}: rank {report.rank} keeps {report.layers_energy_kept:.4%} of the linear layers' change, "
            f"{report.energy_kept:.4%} of the whole",
        ]
    )
