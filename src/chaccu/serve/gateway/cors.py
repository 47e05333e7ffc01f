"""`CorsPolicy`: which pages in browsers may read the gateway's answers (CORS, the Fetch standard's protocol).

Invariants: closed unless origins are named; an origin is compared as a whole; answers never allow credentials, so a page has
to show its key itself. It ignores who asks without a browser.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from chaccu.errors import UsageError

ANY = "*"

_EXPOSED = b"x-request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-requests, \
x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, x-ratelimit-reset-tokens"
_METHODS = b"GET, POST, PUT, DELETE"
# How long a browser may keep the answer to a preflight.
_MAX_AGE_S = b"600"


class CorsPolicy:
    """Lets the pages of `origins` in; `*` is every page."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.encode("ascii") for origin in origins)
        self._is_open = ANY.encode() in self._origins
        self.is_on = bool(self._origins)

    def headers(self, origin: bytes | None) -> list[tuple[bytes, bytes]]:
        """What an answer to a request of `origin` carries."""
        if self._is_open:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        # Caches must not give one origin's answer to another.
        pairs = [(b"vary", b"Origin")]
        if origin in self._origins:
            assert origin is not None
            pairs += [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]
        return pairs

    def preflight(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]] | None:
        """What the answer to a browser's question says beside `headers`, None for what is no such question or no origin that
        is let in. `headers` have lower-case names.
        """
        if method != "OPTIONS" or not self.is_on:
            return None
        asked = dict(headers)
        if b"access-control-request-method" not in asked or not (self._is_open or asked.get(b"origin") in self._origins):
            return None
        allowed = [(b"access-control-allow-methods", _METHODS), (b"access-control-max-age", _MAX_AGE_S)]
        wanted = asked.get(b"access-control-request-headers")
        return allowed if wanted is None else [*allowed, (b"access-control-allow-headers", wanted)]


def check_origin(origin: str) -> None:
    """Raise `UsageError` for what no browser would send as the origin of a page, and is not `*`."""
    parts = urlsplit(origin)
    is_whole = origin == f"{parts.scheme}://{parts.netloc}".lower() and bool(parts.hostname) and "@" not in origin
    if origin != ANY and not is_whole:
        raise UsageError(
            f"{origin!r} is no origin of a page.", remedy="--cors-origin https://HOST or https://HOST:PORT, no path"
        )
