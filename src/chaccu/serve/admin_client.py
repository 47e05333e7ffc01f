"""`AdminClient`: asks a gateway's `/admin/…` for an operator's commands.

Invariants: a refusal is an error in the gateway's own words; the key goes to the named gateway alone, for no redirection is
followed. It ignores what is asked.
"""

from __future__ import annotations

import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

import msgspec

from chaccu.errors import ServeError, UsageError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class AdminClient:
    """One gateway, at `url`; `key`: an API key of scope admin, "" where it has no keys."""

    def __init__(self, url: str, key: str = "") -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no gateway URL.", remedy="write it as http://HOST:PORT")
        self._url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._key = key
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def ask(self, method: str, *path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to a request for `/admin/PATH…`, which may take as long as it takes. Raises `ServeError`."""
        request = urllib.request.Request(
            "/".join([self._url, "admin", *(quote(part, safe="") for part in path)]),
            method=method,
            data=None if body is None else msgspec.json.encode(body),
            headers={"content-type": "application/json", **({"authorization": f"Bearer {self._key}"} if self._key else {})},
        )
        try:
            with self._opener.open(request) as response:
                return msgspec.json.decode(response.read())
        except HTTPError as error:
            with error:
                raise ServeError(f"the gateway refuses: {_read_message(error)}") from error
        except (URLError, HTTPException, OSError) as error:
            raise ServeError(
                f"there is no gateway at {self._url} ({getattr(error, 'reason', error)}).", remedy="check --url"
            ) from error
        except msgspec.DecodeError as error:
            raise ServeError(f"{self._url} does not answer as a gateway does.", remedy="check --url") from error


def _read_message(error: HTTPError) -> str:
    try:
        return str(msgspec.json.decode(error.read())["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"status {error.code}."
