"""Where a worker's gateways are: the named URLs, and the addresses behind a name that stands for several.

`dns+http://NAME:PORT` is every address that NAME resolves to, looked up again and again, so gateways that are added later are
found. Invariants: a URL is checked before anything is loaded; a look-up never blocks the event loop, and one that fails changes
nothing. It ignores who answers there.
"""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit, urlunsplit

import msgspec

from chaccu.errors import UsageError
from chaccu.serve.link import JOIN_PATH

LOOK_AGAIN_S = 5.0
_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_BY_NAME = "dns+"


class GatewayAddress(msgspec.Struct, frozen=True):
    """One gateway: its WebSocket `url`, what people know it by, and the address to dial where that is not the URL's host."""

    url: str
    shown: str
    host: str | None = None


class NamedGateway(msgspec.Struct, frozen=True):
    """A gateway as it was named; with `is_many` the name stands for all of its addresses."""

    url: str
    shown: str
    is_many: bool = False

    async def look_up(self) -> list[GatewayAddress]:
        """Where it is now. Raises `OSError` when its name is not found."""
        if not self.is_many:
            return [GatewayAddress(self.url, self.shown)]
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "wss" else 80)
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        hosts = dict.fromkeys(str(address[0]) for *_, address in found)
        return [GatewayAddress(self.url, f"{self.shown} ({host})", host) for host in hosts]


def parse_gateway(text: str) -> NamedGateway:
    """A gateway as a worker is told of it. Raises `UsageError` when that is no http(s) URL."""
    url = text.removeprefix(_BY_NAME)
    return NamedGateway(join_url(url), url, is_many=url != text)


def join_url(gateway: str) -> str:
    """The WebSocket URL at which workers join the gateway at `gateway`. Raises `UsageError` when that is no http(s) URL."""
    parts = urlsplit(gateway if "://" in gateway else f"http://{gateway}")
    scheme = _SCHEMES.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise UsageError(
            f"{gateway!r} is no gateway URL.", remedy=f"write it as http://HOST:PORT, or {_BY_NAME}http://NAME:PORT"
        )
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + JOIN_PATH, "", ""))
