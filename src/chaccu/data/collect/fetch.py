"""One page over HTTP, politely: robots.txt, one pace a host, retries that wait, bounds on time and size.

Invariants: no request is made that the host's robots.txt disallows (where it cannot be had, all are; where there is none, none
are), nor to an address that is refused, redirects included. A page whose transfer breaks off is not a page. Nothing is
fetched on behalf of anyone: no cookies, no credentials, no proxy from the environment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
import msgspec
from protego import Protego

from chaccu.artifact import library_versions
from chaccu.data.collect.addresses import RefusedAddressError, open_public_socket, refuse_url
from chaccu.data.collect.description import Description
from chaccu.data.collect.pace import HostPace, parse_retry_after, wait_before_retry
from chaccu.data.collect.store import Page

ROBOT_NAME = "Chaccu"
_MOST_REDIRECTS = 5
_MOST_IN_FLIGHT_A_HOST = 4
_LONGEST_RETRY_AFTER_S = 600.0
_ROBOTS_BYTES = 500 << 10
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class NotFetched(msgspec.Struct, frozen=True):
    """A page that could not be had. `outcome`: "disallowed" by robots.txt, "refused" as an address, or "failed"."""

    outcome: str
    reason: str


class _Answer(msgspec.Struct, frozen=True):
    status: int
    headers: dict[str, str]
    body: bytes


class Fetcher:
    """Fetches pages as a `Description` allows; an async context manager. `requests` counts what was sent, robots.txt and
    retries included. `contact` (an address or a URL) is told to the hosts."""

    def __init__(self, description: Description, *, contact: str = "", allow_private: bool = False) -> None:
        self._description = description
        self._allow_private = allow_private
        about = f" (+{contact})" if contact else ""
        self.user_agent = f"{ROBOT_NAME}/{library_versions()['chaccu']}{about}"
        self._paces: dict[str, HostPace] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._robots: dict[str, asyncio.Task[Protego | NotFetched]] = {}
        self.requests = 0

    async def __aenter__(self) -> Fetcher:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=None if self._allow_private else open_public_socket),
            timeout=aiohttp.ClientTimeout(total=self._description.timeout_s),
            headers={"User-Agent": self.user_agent, "Accept": "text/html, application/json;q=0.9, */*;q=0.5"},
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._robots.values():
            task.cancel()
        await self._session.close()

    async def fetch(self, url: str) -> tuple[Page, bytes] | NotFetched:
        """The page at `url` with its bytes, whatever its status but for those that a retry may cure; or why not."""
        here = url
        for _ in range(_MOST_REDIRECTS + 1):
            refusal = refuse_url(here)
            if refusal is not None:
                return NotFetched("refused", refusal)
            forbidden = await self._ask_robots(here)
            if forbidden is not None:
                return forbidden
            answer = await self._request(here, self._description.max_page_bytes)
            if isinstance(answer, NotFetched):
                return answer
            target = answer.headers.get("location")
            if 300 <= answer.status < 400 and target:
                here = urljoin(here, target)
                continue
            headers = {name: value for name, value in answer.headers.items() if name != "set-cookie"}
            page = Page(url=url, final_url=here, status=answer.status, fetched_at_s=round(time.time(), 3), headers=headers)
            return page, answer.body
        return NotFetched("failed", f"more than {_MOST_REDIRECTS} redirects")

    async def _ask_robots(self, url: str) -> NotFetched | None:
        """Why robots.txt of the URL's host keeps us out, or None; it is fetched once a run."""
        host = f"{urlsplit(url).scheme}://{_host_of(url)}"
        if host not in self._robots:
            self._robots[host] = asyncio.ensure_future(self._fetch_robots(host))
        rules = await asyncio.shield(self._robots[host])
        if isinstance(rules, NotFetched):
            return rules
        return None if rules.can_fetch(url, ROBOT_NAME) else NotFetched("disallowed", "robots.txt disallows it")

    async def _fetch_robots(self, host: str) -> Protego | NotFetched:
        url = f"{host}/robots.txt"
        answer = await self._request(url, _ROBOTS_BYTES, cut=True)
        for _ in range(_MOST_REDIRECTS):
            target = answer.headers.get("location") if isinstance(answer, _Answer) and 300 <= answer.status < 400 else None
            if target is None:
                break
            url = urljoin(url, target)
            refusal = refuse_url(url)
            answer = NotFetched("refused", refusal) if refusal else await self._request(url, _ROBOTS_BYTES, cut=True)
        if isinstance(answer, NotFetched):
            if answer.outcome == "refused":
                return answer
            return NotFetched("failed", f"robots.txt of {host} cannot be had ({answer.reason}), so nothing there is fetched")
        text = answer.body.decode("utf-8", errors="replace") if 200 <= answer.status < 300 else ""
        rules = Protego.parse(text)
        delay_s = rules.crawl_delay(ROBOT_NAME)
        if delay_s is not None:
            self._pace_of(host).slow_to(float(delay_s))
        return rules

    def _pace_of(self, url: str) -> HostPace:
        return self._paces.setdefault(_host_of(url), HostPace(1.0 / self._description.rate))

    async def _take_turn(self, url: str) -> None:
        """Wait until the host may be asked. One waits at a time, so that quiet asked for meanwhile holds for the others too."""
        pace = self._pace_of(url)
        async with self._turns.setdefault(_host_of(url), asyncio.Lock()):
            while (wait_s := pace.wait_s(time.monotonic())) > 0:  # noqa: ASYNC110 (the end moves with time, no event tells it)
                await asyncio.sleep(wait_s)
            pace.begin(time.monotonic())

    async def _request(self, url: str, most_bytes: int, *, cut: bool = False) -> _Answer | NotFetched:
        """Try until there is an answer, or the retries are used up."""
        pace = self._pace_of(url)
        why = ""
        for attempt in range(1, self._description.retries + 2):
            async with self._slots.setdefault(_host_of(url), asyncio.Semaphore(_MOST_IN_FLIGHT_A_HOST)):
                await self._take_turn(url)
                tried = await self._request_once(url, most_bytes, cut=cut)
            if isinstance(tried, NotFetched):
                return tried
            if isinstance(tried, str):
                why, asked_s = tried, None
            elif tried.status not in _TRY_AGAIN:
                return tried
            else:
                why, asked_s = f"status {tried.status}", parse_retry_after(tried.headers.get("retry-after"), time.time())
            if asked_s is not None and asked_s > _LONGEST_RETRY_AFTER_S:
                pace.be_quiet(time.monotonic(), _LONGEST_RETRY_AFTER_S)
                return NotFetched("failed", f"{why}, and to be asked again in {asked_s:,.0f} s only")
            if attempt <= self._description.retries:
                if asked_s is not None:
                    # The host asked for quiet: that holds for all that is asked of it.
                    pace.be_quiet(time.monotonic(), asked_s)
                await asyncio.sleep(max(wait_before_retry(attempt), asked_s or 0.0))
        return NotFetched("failed", f"{why} after {self._description.retries + 1} tries")

    async def _request_once(self, url: str, most_bytes: int, *, cut: bool) -> _Answer | NotFetched | str:
        """One answer, a final no, or (a text) what went wrong and may be tried again."""
        self.requests += 1
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                body = await _read_body(response, most_bytes, cut=cut)
                if body is None:
                    return NotFetched("failed", f"larger than {most_bytes:,} bytes")
                return _Answer(response.status, _plain(response.headers), body)
        except TimeoutError:
            return f"no answer within {self._description.timeout_s:g} s"
        except (aiohttp.InvalidURL, ValueError) as error:
            return NotFetched("failed", f"no URL: {error}")
        except (aiohttp.ClientError, OSError) as error:
            refused = _find_refusal(error)
            if refused is not None:
                return NotFetched("refused", str(refused))
            return str(error) or type(error).__name__


def _host_of(url: str) -> str:
    """Host and port, which robots.txt and the pace are of."""
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def _find_refusal(error: BaseException | None) -> RefusedAddressError | None:
    """The refusal of an address that the HTTP client has wrapped in an error of its own."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, RefusedAddressError):
            return error
        error = error.__cause__ or error.__context__ or getattr(error, "os_error", None)
        seen += 1
    return None


async def _read_body(response: aiohttp.ClientResponse, most_bytes: int, *, cut: bool) -> bytes | None:
    """The body; None when it is longer than `most_bytes`, or with `cut` its beginning."""
    pieces: list[bytes] = []
    size = 0
    async for piece in response.content.iter_chunked(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > most_bytes:
            response.close()
            return b"".join(pieces)[:most_bytes] if cut else None
    return b"".join(pieces)


def _plain(headers: Mapping[str, Any]) -> dict[str, str]:
    """Headers with names in lower case; bytes that are no UTF-8 (surrogates, here) written out."""
    return {name.lower(): str(value).encode("utf-8", errors="backslashreplace").decode() for name, value in headers.items()}
