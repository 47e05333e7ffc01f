"""`chaccu workers`: what a gateway's workers serve, and changes to it while they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from chaccu.serve.admin_client import AdminClient

app = typer.Typer(name="workers", help="Workers of a gateway: who serves what; drain, load, unload.", no_args_is_help=True)

_Worker = Annotated[str, typer.Argument(metavar="WORKER", help="The worker's name, as the list shows it.")]
_Adapter = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
_Url = Annotated[str, typer.Option(envvar="CHACCU_URL", help="The gateway.")]
_ApiKey = Annotated[str, typer.Option(envvar="CHACCU_API_KEY", help="Key of scope admin, where the gateway has keys.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
_HERE = "http://127.0.0.1:8000"


@app.callback()
def workers_group() -> None:
    """Workers of a gateway: who serves what; drain, load, unload."""


@app.command("list", epilog="Example: chaccu workers list --url http://127.0.0.1:8000")
def list_command(url: _Url = _HERE, api_key: _ApiKey = "", as_json: _Json = False) -> None:
    """List the workers by model: engine, state, requests under way."""
    _print(_client(url, api_key).ask("GET", "workers"), as_json=as_json)


@app.command("drain", epilog="Example: chaccu workers drain gpu1-4711-a1b2c3")
def drain_command(worker: _Worker, url: _Url = _HERE, api_key: _ApiKey = "", as_json: _Json = False) -> None:
    """Give a worker nothing new; what it has, it finishes."""
    _print(_client(url, api_key).ask("POST", "workers", worker, "drain"), as_json=as_json)


@app.command("undrain", epilog="Example: chaccu workers undrain gpu1-4711-a1b2c3")
def undrain_command(worker: _Worker, url: _Url = _HERE, api_key: _ApiKey = "", as_json: _Json = False) -> None:
    """Give it new requests again."""
    _print(_client(url, api_key).ask("POST", "workers", worker, "undrain"), as_json=as_json)


@app.command("load", epilog="Example: chaccu workers load gpu1-4711-a1b2c3 law law-7")
def load_command(
    worker: _Worker,
    adapter: _Adapter,
    path: Annotated[str, typer.Argument(help="Its folder on the worker's disk, below the worker's --allow-load.")],
    url: _Url = _HERE,
    api_key: _ApiKey = "",
    as_json: _Json = False,
) -> None:
    """Have a worker serve an adapter; returns when it does."""
    body = {"adapter": adapter, "path": path}
    _print(_client(url, api_key).ask("POST", "workers", worker, "load", body=body), as_json=as_json)


@app.command("unload", epilog="Example: chaccu workers unload gpu1-4711-a1b2c3 law")
def unload_command(
    worker: _Worker, adapter: _Adapter, url: _Url = _HERE, api_key: _ApiKey = "", as_json: _Json = False
) -> None:
    """Have a worker serve an adapter no more; returns when its last request has ended."""
    _print(_client(url, api_key).ask("POST", "workers", worker, "unload", body={"adapter": adapter}), as_json=as_json)


def _client(url: str, api_key: str) -> AdminClient:
    from chaccu.serve.admin_client import AdminClient

    return AdminClient(url, api_key)


def _print(statuses: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode(statuses).decode())
        return
    for one in statuses:
        model = f"{one['model']} over {one['base']}" if one["base"] else one["model"]
        engine = f"{one['engine']} on {one['device']}"
        typer.echo(f"{one['worker']}  {model}  {engine}  {one['state']}  {one['outstanding']} under way")
