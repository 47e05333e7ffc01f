"""`chaccu weights repair`: find what makes a model folder unloadable, show it, mend it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chaccu.cli.progress_bar import counting

if TYPE_CHECKING:
    from chaccu.weights.repair import Draft, Finding


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("repair", epilog="Example: chaccu weights repair llama-7b-hf --out llama-7b")(repair_command)


def repair_command(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A model's Hugging Face folder; without --write a hub id too.")],
    check: Annotated[
        bool, typer.Option("--check", help="Show what is wrong and change nothing: what happens by itself.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Mend the folder itself.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a mended copy to this folder, and leave DIR as it is.")] = None,
    chat_format: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Chat format whose template the tokenizer is to have.")
    ] = None,
    grow_embeddings: Annotated[
        bool, typer.Option("--grow-embeddings", help="Add rows for tokens that have none, each the mean of all; with --out.")
    ] = False,
    no_backup: Annotated[bool, typer.Option("--no-backup", help="Keep no originals as NAME.orig.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Find what makes a model folder unloadable or wrong, show each change, and make it when asked.

    Ends with 1 when something is wrong, or is still wrong after mending. Code and pickles in the folder are never run.
    """
    from chaccu.errors import UsageError
    from chaccu.weights.repair import RepairOptions, examine_folder, mend_copy, mend_folder

    if check + write + (out is not None) > 1:
        raise UsageError("--check, --write and --out exclude one another.", remedy="give one of them")
    if grow_embeddings and write:
        raise UsageError("--grow-embeddings changes a copy alone.", remedy="--out DIR instead of --write")
    folder = _find_folder(model, write)
    options = RepairOptions(chat_format=chat_format, grow_embeddings=grow_embeddings)
    draft = examine_folder(folder, options)
    left: Sequence[Finding] = draft.findings
    if write or out is not None:
        with counting("mending") as progress:
            if out is not None:
                mend_copy(draft, out, progress=progress)
            elif any(finding.mendable for finding in draft.findings):
                mend_folder(draft, backup=not no_backup, progress=progress)
        # Looked at again: whatever was not mended, or not rightly, is said.
        left = examine_folder(out or folder, options).findings
    if as_json:
        _print_json(draft, left, out)
    else:
        _print_findings(draft, left, out or folder, is_written=write or out is not None)
    if left:
        raise typer.Exit(1)


def _find_folder(model: str, write: bool) -> Path:
    from chaccu.errors import UsageError
    from chaccu.weights.model_files import find_model

    if write and not Path(model).expanduser().is_dir():
        raise UsageError(f"there is no folder {model}; what the hub has is not mended in its cache.", remedy="--out DIR")
    return find_model(model, pickled=True)


def _print_json(draft: Draft, left: Sequence[Finding], out: Path | None) -> None:
    import msgspec

    report = {
        "folder": str(draft.folder),
        "out": out and str(out),
        "findings": draft.findings,
        "notes": draft.notes,
        "left": left,
    }
    typer.echo(msgspec.json.encode(report).decode())


def _print_findings(draft: Draft, left: Sequence[Finding], mended: Path, *, is_written: bool) -> None:
    for finding in draft.findings:
        typer.echo(f"{f'{finding.file} ' if finding.file else ''}{finding.problem}")
        typer.echo(f"  {'→' if finding.mendable else 'try:'} {finding.mending}")
        for line in finding.diff.splitlines():
            typer.echo(f"    {line}")
    for note in draft.notes:
        typer.echo(f"note: {note}")
    faults = "1 fault" if len(draft.findings) == 1 else f"{len(draft.findings)} faults"
    mendable = sum(finding.mendable for finding in draft.findings)
    if not draft.findings:
        typer.echo(f"{draft.folder} is sound")
    elif not is_written:
        typer.echo(f"{faults} = {mendable} that --write mends + {len(draft.findings) - mendable} that it does not")
    else:
        typer.echo(f"{mended}: {faults} found, {len(left)} left")
        known = {(finding.file, finding.problem) for finding in draft.findings}
        for finding in left:
            if (finding.file, finding.problem) not in known:
                typer.echo(f"left: {finding.file} {finding.problem}\n  try: {finding.mending}")
