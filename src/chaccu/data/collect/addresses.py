"""Which addresses a page may come from: http and https, and no address of a private network unless allowed.

Invariant: what is judged is the address that is about to be connected to, however it was written or looked up (a name that
changes between two look-ups, a number in another base, a redirect). So a URL found in a page reaches nothing that only this
machine can reach.
"""

from __future__ import annotations

import ipaddress
import socket

from aiohttp import AddrInfoType
from yarl import URL


class RefusedAddressError(OSError):
    """An address that is not to be connected to."""


def refuse_url(url: str) -> str | None:
    """Why `url` is not fetched, or None: it is malformed, has no host, or a scheme other than http and https."""
    try:
        parsed = URL(url)
    except (ValueError, TypeError) as error:
        return f"no URL: {error}"
    if parsed.scheme not in ("http", "https"):
        return f"the scheme is {parsed.scheme!r}, not http or https"
    return None if parsed.host else "no host"


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, and so does the IPv4 address inside it, if there is one."""
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = (getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)) if found.version == 6 else None
    return found.is_global and not found.is_multicast and (inner is None or inner.is_global)


def open_public_socket(address: AddrInfoType) -> socket.socket:
    """A socket for `address`. Raises `RefusedAddressError` when it is not public."""
    family, kind, protocol, _, place = address
    if family not in (socket.AF_INET, socket.AF_INET6) or not is_public(str(place[0])):
        # One wording for all addresses of a host: errors that differ are run together into one without a type.
        raise RefusedAddressError("the host has a private address")
    return socket.socket(family, kind, protocol)
