"""`chaccu weights inspect`: what a folder or file of weights is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chaccu.cli.progress_bar import counting

if TYPE_CHECKING:
    from chaccu.weights.ancestry import Ancestor
    from chaccu.weights.inspection import Inspection, TensorRow
    from chaccu.weights.tensor_stats import TensorStats


def register(app: typer.Typer) -> None:
    """Add the command to `chaccu weights`."""
    app.command("inspect", epilog="Example: chaccu weights inspect runs/demo/adapter --tensors")(inspect_command)


def inspect_command(
    name: Annotated[str, typer.Argument(metavar="WHAT", help="A folder, a GGUF file or a hub id.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor: dtype, shape, bytes.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read every tensor too: least, greatest, mean, deviation, values not finite.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file, against the manifest where there is one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a model, adapter, delta or GGUF file is, from its headers: nothing of it is loaded."""
    import msgspec

    from chaccu.weights.inspection import inspect_weights

    found = inspect_weights(name, verify=verify)
    measured = _measure(found) if stats else {}
    if as_json:
        shown: dict[str, Any] = msgspec.to_builtins(found)
        if not tensors and not stats:
            del shown["tensors"]
        for row in shown.get("tensors", []) if stats else []:
            row["stats"] = msgspec.to_builtins(measured[row["file"], row["name"]])
        typer.echo(msgspec.json.encode(shown).decode())
        return
    lines = [*_summary(found), *_files(found)]
    if tensors or stats:
        lines += ["", *_tensors(found.tensors, measured)]
    for line in lines:
        typer.echo("".join(letter if letter.isprintable() else "\ufffd" for letter in line))  # names may be anybody's


def _measure(found: Inspection) -> dict[tuple[str, str], TensorStats]:
    from chaccu.weights.tensor_stats import measure_tensors

    with counting("reading") as progress:
        rows = measure_tensors(Path(found.path), found.tensors, progress=progress)
        return {(row.file, row.name): stats for row, stats in rows}


def _summary(found: Inspection) -> Iterator[str]:
    facts: dict[str, Any] = {
        "kind": found.kind,
        "name": found.name,
        "architecture": found.architecture,
        "parameters": f"{found.parameters:,}" if found.tensors else None,
        "dtypes": "; ".join(
            f"{dtype}: {count.tensors:,} tensors, {count.parameters:,} parameters, {_size(count.size_bytes)}"
            for dtype, count in found.dtypes.items()
        ),
        "size": f"{_size(found.size_bytes)} in {len(found.files)} files",
        "adapter": ", ".join(f"{key} {value}" for key, value in (found.adapter or {}).items()),
        "tokenizer": f"SHA-256 {found.tokenizer_sha256}" if found.tokenizer_sha256 else None,
        "chat format": found.chat_format or ("a chat template of its own" if found.chat_template else None),
        "licence": found.license or "none stated",
        "losses": ", ".join(f"{key} {_number(value)}" for key, value in found.losses.items() if value is not None),
        "files": "every one has the manifest's SHA-256" if found.verified else None,
    }
    yield found.path
    yield from (f"  {key:13} {value}" for key, value in facts.items() if value)
    for ancestor, depth in _walk(found.parents, 0):
        what = f"{ancestor.kind} {ancestor.name}, {ancestor.folder}" if ancestor.folder else "not found beside it"
        yield f"  {'made of' if not depth else '':13} {'  ' * depth}{ancestor.role} {ancestor.sha256[:12]}… ({what})"


def _walk(ancestors: Iterable[Ancestor], depth: int) -> Iterator[tuple[Ancestor, int]]:
    for ancestor in ancestors:
        yield ancestor, depth
        yield from _walk(ancestor.parents, depth + 1)


def _files(found: Inspection) -> list[str]:
    rows = [(one.name, f"{one.size_bytes:,}", one.sha256 or "") for one in found.files]
    return ["", *_table(("file", "bytes", "SHA-256"), rows, right=(1,))]


def _tensors(tensors: Iterable[TensorRow], measured: dict[tuple[str, str], TensorStats]) -> list[str]:
    head: tuple[str, ...] = ("tensor", "dtype", "shape", "bytes")
    rows: list[tuple[str, ...]] = []
    for one in tensors:
        row = (one.name, one.dtype, " × ".join(map(str, one.shape)), f"{one.size_bytes:,}")
        stats = measured.get((one.file, one.name))
        if stats is not None:
            values = (stats.minimum, stats.maximum, stats.mean, stats.std)
            row = (*row, *(_number(value) for value in values), f"{stats.non_finite:,}")  # type: ignore[assignment]
        rows.append(row)
    if measured:
        head = (*head, "min", "max", "mean", "std", "not finite")
    return _table(head, rows, right=tuple(range(3, len(head))))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if at in right else text.ljust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.2f} MB"
