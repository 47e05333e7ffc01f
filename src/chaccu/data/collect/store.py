"""Raw pages on disk: each one file, its `Page` record in JSON on the first line and its bytes, as they came, after it.

Invariants: a page is there whole, with what is known of it, or not at all, whenever the run is killed. Its place follows from
its URL, so going on needs no list of what has been done. Pages are never changed.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import msgspec

from chaccu.artifact import atomic_file, storage_errors
from chaccu.errors import DataError


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """How a page came: the URL asked for, the one that answered after redirects, status, seconds since the epoch, headers."""

    url: str
    final_url: str
    status: int
    fetched_at_s: float
    headers: dict[str, str]

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300


class PageStore:
    """The pages under a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path_of(self, url: str) -> Path:
        """Where the page of `url` is, or would be."""
        name = sha256(url.encode("utf-8", errors="surrogatepass")).hexdigest()
        return self._folder / name[:2] / f"{name[:40]}.page"

    def has(self, url: str) -> bool:
        return self.path_of(url).is_file()

    def put(self, page: Page, body: bytes) -> None:
        """Keep a page. Raises `StorageError`."""
        with atomic_file(self.path_of(page.url)) as file:
            file.write(msgspec.json.encode(page) + b"\n" + body)

    def get(self, url: str) -> tuple[Page, bytes]:
        """A page that is there. Raises `StorageError`, and `DataError` when the file is none of ours."""
        path = self.path_of(url)
        with storage_errors(path):
            head, _, body = path.read_bytes().partition(b"\n")
        try:
            return msgspec.json.decode(head, type=Page), body
        except msgspec.DecodeError as error:
            raise DataError(f"{path} is damaged: {error}.", remedy="delete it, and it is fetched again") from error
