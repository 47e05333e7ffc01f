"""`chaccu weights publish`: an artifact to the model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `chaccu weights`."""
    app.command(
        "publish", epilog="Example: chaccu weights publish releases/gemma-3-270m-chaccu-lora --repo me/my-gemma --dry-run"
    )(publish_command)


def publish_command(
    folder: Annotated[Path, typer.Argument(help="An artifact: a model, adapter, delta or GGUF folder.")],
    repo: Annotated[str, typer.Option(help="The repository, as OWNER/NAME; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one; one in public is refused.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent; no host is asked.")] = False,
    license_name: Annotated[
        str | None, typer.Option("--license", help="The licence by the hub's name; left out: the manifest's.")
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="The base's hub id; left out: the manifest's.")] = None,
    terms: Annotated[Path | None, typer.Option(help="The base's licence; left out: the packaged model's.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="What it was trained on, as chaccu weights release takes it; repeatable.")
    ] = None,
    statement: Annotated[Path | None, typer.Option("--data-statement", help="Markdown about the data, for the card.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="A dataset's hub id, for the card; repeatable.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Send an artifact to the Hugging Face hub with a model card, as one commit. The token is HF_TOKEN's or the login's."""
    import msgspec

    from chaccu.weights.publish import PublishOptions, prepare_publication

    options = PublishOptions(
        license=license_name, base_name=base_name, terms=terms, data=data or (), statement=statement, datasets=dataset or ()
    )
    publication = prepare_publication(folder, repo, options)
    report = {"repo": repo, "private": private, "files": publication.sizes}
    total = f"{len(publication.sizes)} files, {sum(publication.sizes.values()):,} bytes"
    if dry_run:
        if as_json:
            typer.echo(msgspec.json.encode({**report, "card": publication.card}).decode())
            return
        for name, size in publication.sizes.items():
            typer.echo(f"{size:>15,}  {name}{'  (written for this)' if name in publication.texts else ''}")
        typer.echo(f"{total} would go to {repo}; weights of an earlier version there would be removed. The card:\n")
        typer.echo(publication.card, nl=False)
        return
    from chaccu.weights.hub_upload import upload_publication

    upload = upload_publication(publication, private=private, message=message)
    if as_json:
        typer.echo(msgspec.json.encode({**report, **msgspec.to_builtins(upload)}).decode())
        return
    typer.echo(f"{upload.url}: {total}")
    if upload.removed:
        typer.echo(f"removed of an earlier version: {', '.join(upload.removed)}")
