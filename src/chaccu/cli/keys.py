"""`chaccu keys`: the API keys of a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="keys", help="API keys: who may use a gateway.", no_args_is_help=True)

_File = Annotated[
    Path,
    typer.Option("--keys", metavar="FILE", envvar="CHACCU_KEYS", help="The file of keys, as chaccu gateway --keys names it."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


@app.callback()
def keys_group() -> None:
    """API keys: who may use a gateway."""


@app.command("create", epilog="Example: chaccu keys create --keys keys.json --name alice")
def create_command(
    file: _File,
    name: Annotated[str, typer.Option(help="Whose key it is, for lists.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="chat (the default), worker, admin or metrics; repeat for more.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Bind the key to this model: to chat with, or to serve; repeat for more.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Requests a minute; more get status 429.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Tokens of prompts and answers a minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    as_json: _Json = False,
) -> None:
    """Make a key and print it, this once: only its hash is kept. A running gateway knows it within a second."""
    import msgspec

    from chaccu.serve.gateway.access.keys import KeyFile, describe_key
    from chaccu.serve.gateway.access.limits import Limits

    limits = Limits(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, concurrent=concurrent)
    shown, key = KeyFile(file).create(name, scope or ["chat"], model or [], limits)
    if as_json:
        typer.echo(msgspec.json.encode({"key": shown, **describe_key(key)}).decode())
        return
    typer.echo(shown)
    typer.echo(f"key {key.id} of {key.name} ({', '.join(key.scopes)}) is in {file}; it will not be shown again", err=True)


@app.command("list", epilog="Example: chaccu keys list --keys keys.json")
def list_command(file: _File, as_json: _Json = False) -> None:
    """List the keys, revoked ones too: id, name, scopes, models; never the keys themselves."""
    import msgspec

    from chaccu.serve.gateway.access.keys import KeyFile, describe_key

    keys = KeyFile(file).read()
    if as_json:
        typer.echo(msgspec.json.encode([describe_key(key) for key in keys]).decode())
        return
    for key in keys:
        state = f"revoked {key.revoked}" if key.revoked else f"since {key.created}"
        models = ", ".join(key.models) or "all models"
        typer.echo(f"{key.id}  {key.name}  {', '.join(key.scopes)}  {models}  {state}")


@app.command("revoke", epilog="Example: chaccu keys revoke 1f0c2b7a --keys keys.json")
def revoke_command(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as the list shows it.")],
    file: _File,
) -> None:
    """End a key: a running gateway refuses it within a second, and lets go of the workers that joined with it."""
    from chaccu.serve.gateway.access.keys import KeyFile

    key = KeyFile(file).revoke(key_id)
    typer.echo(f"key {key.id} of {key.name} is revoked", err=True)
