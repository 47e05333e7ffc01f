"""`GatewayConfig`: what a gateway is told at its start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import msgspec

from chaccu.errors import UsageError
from chaccu.serve.gateway.cors import ANY, check_origin

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Upstream(msgspec.Struct, frozen=True):
    """An OpenAI-compatible server that serves the model `name`; `url` is its base, ending in /v1 as a rule."""

    name: str
    url: str


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`port` 0 lets the kernel pick. `aliases`: models by weight, by the name that stands for them. `join_token`: what workers
    must show; may be empty on loopback only, and with keys no worker joins by an empty one. `keys`: the file of API keys; None
    asks for none, on loopback or where `is_open` says that this is meant.

    `cors_origins`: whose pages in browsers may read answers, `*` for all. `tls_cert`, `tls_key`: PEM files that make it https;
    with `tls_client_ca` only clients and workers with a certificate of that authority are heard.

    `stall_s`: a worker that has requests and was not heard for so long, pings included, is suspended, and its answers go on
    elsewhere; 0 waits for its connection to break. `hedge`: a second worker may be asked for an answer that is slow to begin.

    `queue_size`: requests of one model that may wait while its workers have all that they can answer at once; `queue_wait_s`:
    for how long.

    `rejoin_wait_s`: how long a request waits for a worker of a model that has lost its last one. `max_attempts`: workers that
    one answer may be given to in turn, so that a request which kills its worker cannot kill them all. `max_body_bytes`:
    longest request body. `head_timeout_s`, `body_timeout_s`: how long a client may take to send a request's head, and its body.
    `unread_timeout_s`: how long it may read nothing of an answer that waits for it. `keep_alive_s`: how long a connection
    without a request stays open.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    upstreams: tuple[Upstream, ...] = ()
    aliases: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    join_token: str = ""
    keys: Path | None = None
    is_open: bool = False
    cors_origins: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    queue_size: int = 1000
    queue_wait_s: float = 60.0
    rejoin_wait_s: float = 5.0
    stall_s: float = 5.0
    hedge: bool = True
    max_attempts: int = 3
    max_body_bytes: int = 4 * 2**20
    head_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    unread_timeout_s: float = 120.0
    keep_alive_s: float = 60.0


def parse_upstream(text: str) -> Upstream:
    """An upstream from `NAME=URL`. Raises `UsageError` when it is not of that form."""
    name, _, url = text.partition("=")
    parts = urlsplit(url)
    if not name or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{text!r} is no upstream.", remedy="write it as NAME=http://HOST:PORT/v1")
    return Upstream(name, url.rstrip("/"))


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine alone."""
    return host in _LOOPBACK


def check_config(config: GatewayConfig) -> None:
    """Raise `UsageError` for a configuration that must not be served."""
    if not is_loopback(config.host) and config.keys is None and not config.is_open:
        raise UsageError(
            f"the gateway would listen on {config.host} without API keys, so anyone who reaches it could use it.",
            remedy="--keys with a file that chaccu keys create wrote, --open if it is for everyone, or listen on 127.0.0.1",
        )
    if not is_loopback(config.host) and not config.join_token and config.keys is None:
        raise UsageError(
            f"the gateway would listen on {config.host} with no join token, so anyone who reaches it could join as a worker.",
            remedy="set CHACCU_JOIN_TOKEN (or --join-token) here and for the workers, or listen on 127.0.0.1",
        )
    for origin in config.cors_origins:
        check_origin(origin)
    if ANY in config.cors_origins and config.keys is None:
        raise UsageError(
            "--cors-origin '*' without API keys would let every page that anyone opens use the gateway.",
            remedy="name the pages' origins, or add --keys",
        )
    if config.tls_cert is None and (config.tls_key is not None or config.tls_client_ca is not None):
        raise UsageError("there is no TLS without a certificate.", remedy="--tls-cert with the gateway's own")
    names = [upstream.name for upstream in config.upstreams]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"the upstream {twice[0]!r} is named twice.", remedy="give each --upstream its own name")
