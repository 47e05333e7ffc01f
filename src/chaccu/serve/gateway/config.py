"""`GatewayConfig`: what a gateway is told at its start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import msgspec

from chaccu.errors import UsageError, did_you_mean
from chaccu.serve.gateway.access.leased_meter import WhenDown
from chaccu.serve.gateway.cors import ANY, check_origin

_UPSTREAM_OPTIONS = {
    "weight": "weight",
    "priority": "priority",
    "as": "remote_model",
    "key-env": "key_env",
    "continues": "continues",
}
_MAX_WEIGHT = 1000.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Upstream(msgspec.Struct, frozen=True):
    """An OpenAI-compatible server that serves the model `name`; `url` is its base, ending in /v1 as a rule.

    `weight`: its share of the requests beside equal upstreams of weight 1; one of lower `priority` gets requests only while
    those above are left out. `remote_model`: the model's name there, if it is another. `key_env`: the environment variable that
    holds its API key. `continues`: whether it goes on with a last message of the assistant.
    """

    name: str
    url: str
    weight: float = 1.0
    priority: int = 0
    remote_model: str = ""
    key_env: str = ""
    continues: bool = True


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`port` 0 lets the kernel pick. `aliases`: models by weight, by the name that stands for them. `join_token`: what workers
    must show; may be empty on loopback only, and with keys no worker joins by an empty one. `keys`: the file of API keys; None
    asks for none, on loopback or where `is_open` says that this is meant.

    `shared_state`: URL of a Redis or Valkey in which gateways keep the limits of keys together, empty for each by itself;
    `shared_state_down`: while it does not answer, keep to the limits as if there were no other gateway, or refuse keys with
    limits.

    `cors_origins`: whose pages in browsers may read answers, `*` for all. `tls_cert`, `tls_key`: PEM files that make it https;
    with `tls_client_ca` only clients and workers with a certificate of that authority are heard.

    `stall_s`: a worker that has requests and was not heard for so long, pings included, is suspended, and its answers go on
    elsewhere; 0 waits for its connection to break. `hedge`: a second worker may be asked for an answer that is slow to begin.
    `upstream_stall_s`: how long an upstream's stream may stand still before another one goes on with it; 0 for ever.
    `first_byte_s`: how long an upstream may say nothing to a request before it is probed, and another one is asked where it
    does not answer that either; 0 for ever.

    `queue_size`: requests of one model that may wait while its workers have all that they can answer at once; `queue_wait_s`:
    for how long.

    `rejoin_wait_s`: how long a request waits for a worker of a model that has lost its last one, and for an upstream.
    `max_attempts`: workers or upstreams that one answer may be given to in turn, so that a request which kills its worker
    cannot kill them all. `max_body_bytes`: longest request body. `head_timeout_s`, `body_timeout_s`: how long a client may
    take to send a request's head, and its body. `request_timeout_s`: how long a whole request may take, its time in queues
    included; 0 is without end. `unread_timeout_s`: how long a client may read nothing of an answer that waits for it.
    `drain_s`: how long a gateway that is told to end waits for what is under way.
    `keep_alive_s`: how long a connection without a request stays open. `max_connections`: how many clients may have at once.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    upstreams: tuple[Upstream, ...] = ()
    aliases: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    join_token: str = ""
    keys: Path | None = None
    is_open: bool = False
    shared_state: str = ""
    shared_state_down: WhenDown = "local"
    cors_origins: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    queue_size: int = 1000
    queue_wait_s: float = 60.0
    rejoin_wait_s: float = 5.0
    stall_s: float = 5.0
    hedge: bool = True
    upstream_stall_s: float = 60.0
    first_byte_s: float = 120.0
    max_attempts: int = 3
    max_body_bytes: int = 4 * 2**20
    head_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    unread_timeout_s: float = 120.0
    request_timeout_s: float = 3600.0
    max_connections: int = 10_000
    keep_alive_s: float = 60.0
    drain_s: float = 30.0


def parse_upstream(text: str) -> Upstream:
    """An upstream from `NAME=URL,weight=2,priority=1,as=MODEL,key-env=VARIABLE,continues=false`, the options left out at will.

    Raises `UsageError` when it is not of that form.
    """
    address, *options = text.split(",")
    name, _, url = address.partition("=")
    parts = urlsplit(url)
    if not name or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{text!r} is no upstream.", remedy="write it as NAME=http://HOST:PORT/v1")
    settings: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in _UPSTREAM_OPTIONS or not value:
            raise UsageError(f"the upstream {name!r} has the option {option!r}.", remedy=did_you_mean(key, _UPSTREAM_OPTIONS))
        settings[_UPSTREAM_OPTIONS[key]] = value
    try:
        upstream = msgspec.convert({"name": name, "url": url.rstrip("/"), **settings}, Upstream, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"{text!r}: {error}.", remedy="weight and priority are numbers, continues is true or false") from error
    if not 0 < upstream.weight <= _MAX_WEIGHT:
        raise UsageError(f"the upstream {name!r} has the weight {upstream.weight:g}.", remedy=f"above 0, up to {_MAX_WEIGHT:g}")
    return upstream


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
    if config.shared_state and config.keys is None:
        raise UsageError(
            "--shared-state keeps the limits of API keys, and there are none.", remedy="add --keys, or leave it out"
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
    named = [(upstream.name, upstream.url) for upstream in config.upstreams]
    twice = sorted({one for one in named if named.count(one) > 1})
    if twice:
        raise UsageError(f"the upstream {'='.join(twice[0])!r} is named twice.", remedy="give each --upstream its own URL")
