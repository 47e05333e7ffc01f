"""`collect_conversations`: walk from the first pages along their links, keep every page, write the conversations.

Invariants: the walk is decided by the pages alone, in breadth and in the order of each page's links; a page that is stored is
not fetched again. So a run that was killed goes on where it was, a finished one only writes its output anew, and either ends
with the same conversations as an undisturbed one. A changed description applies to the pages that are there already.
Counts reconcile: every URL of the walk is stored, disallowed, refused or failed, with one line of the index.
Memory holds the URLs of the walk, and one page at a time (besides those in flight).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from chaccu.artifact import atomic_file, write_json
from chaccu.data.collect.description import Description
from chaccu.data.collect.extract import Found, PageError, extract_page
from chaccu.data.collect.fetch import Fetcher, NotFetched
from chaccu.data.collect.store import Page, PageStore
from chaccu.errors import DataError, UsageError

CONVERSATIONS_NAME = "conversations.jsonl"
INDEX_NAME = "index.jsonl"
REPORT_NAME = "report.json"
_TOGETHER = 16


class IndexLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one URL. `file` is its page, relative to the folder; `problem` why it gave no links or conversations."""

    url: str
    outcome: str
    reason: str = ""
    page: Page | None = None
    file: str = ""
    links: int = 0
    conversations: int = 0
    problem: str = ""


class CollectReport(msgspec.Struct, frozen=True):
    """Counts of a run: `urls` = the sum of `outcomes` (stored, disallowed, refused, failed). `requests` were sent by this
    run, robots.txt and retries included; `problems` counts stored pages that gave nothing, by reason; `failures` are the
    first reasons by URL."""

    urls: int
    outcomes: dict[str, int]
    fetched: int
    requests: int
    conversations: int
    problems: dict[str, int]
    failures: dict[str, str]

    def warnings(self) -> list[str]:
        """A sentence for each kind of page that gave nothing."""
        said = [f"{count:,} stored pages gave nothing: {problem}" for problem, count in self.problems.items()]
        missing = self.urls - self.outcomes.get("stored", 0)
        if missing:
            url, why = next(iter(self.failures.items()))
            said.append(f"{missing:,} pages could not be had, see {INDEX_NAME}; the first is {url} ({why})")
        return said


def collect_conversations(
    description: Description,
    out: Path,
    *,
    limit: int | None = None,
    contact: str = "",
    allow_private: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CollectReport:
    """Collect into the folder `out`: `pages/`, `index.jsonl`, `conversations.jsonl`, `report.json`.

    `limit` ends the walk at so many conversations. `progress` is told pages and conversations so far. Raises `UsageError` for
    a folder that holds something else, `StorageError`, and `DataError` when there is no conversation at all.
    """
    if out.exists() and any(out.iterdir()) and not (out / "pages").is_dir():
        raise UsageError(f"{out} is there already and no collection.", remedy="name a new folder with --out")
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}.", remedy="give 1 or more")
    (out / "pages").mkdir(parents=True, exist_ok=True)
    with atomic_file(out / CONVERSATIONS_NAME) as conversations, atomic_file(out / INDEX_NAME) as index:
        walk = _Walk(description, PageStore(out / "pages"), conversations, index, limit, progress)
        report = asyncio.run(walk.run(contact=contact, allow_private=allow_private))
        if not report.conversations:
            first = next((f"; {url}: {why}" for url, why in report.failures.items()), "")
            raise DataError(
                f"no conversation was found in {report.urls:,} pages{first}.",
                remedy="look at pages/ and at the selectors; run it again to try what failed",
            )
    write_json(out / REPORT_NAME, report)
    return report


class _Walk:
    """The walk of one run."""

    def __init__(
        self,
        description: Description,
        store: PageStore,
        conversations: IO[bytes],
        index: IO[bytes],
        limit: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._description = description
        self._store = store
        self._conversations = conversations
        self._index = index
        self._limit = limit
        self._progress = progress
        self._outcomes: Counter[str] = Counter()
        self._problems: Counter[str] = Counter()
        self._failures: dict[str, str] = {}
        self._fetched = 0
        self._written = 0

    async def run(self, *, contact: str, allow_private: bool) -> CollectReport:
        async with Fetcher(self._description, contact=contact, allow_private=allow_private) as fetcher:
            seen = dict.fromkeys(self._description.start)
            level = list(seen)
            while level and not self._is_full():
                found: list[str] = []
                for begin in range(0, len(level), self._batch_size()):
                    if self._is_full():
                        break
                    batch = level[begin : begin + self._batch_size()]
                    outcomes = await asyncio.gather(*(self._get(fetcher, url) for url in batch))
                    for url, outcome in zip(batch, outcomes, strict=True):
                        if not self._is_full():
                            found += self._take(url, outcome)
                level = [url for url in dict.fromkeys(found) if url not in seen]
                seen.update(dict.fromkeys(level))
            return CollectReport(
                urls=sum(self._outcomes.values()),
                outcomes=dict(sorted(self._outcomes.items())),
                fetched=self._fetched,
                requests=fetcher.requests,
                conversations=self._written,
                problems=dict(self._problems.most_common()),
                failures=self._failures,
            )

    def _batch_size(self) -> int:
        # Constant through a run, so that a run that goes on takes the same batches.
        return _TOGETHER if self._limit is None else min(_TOGETHER, self._limit)

    def _is_full(self) -> bool:
        return self._limit is not None and self._written >= self._limit

    async def _get(self, fetcher: Fetcher, url: str) -> NotFetched | None:
        """None when the page is stored, now or before."""
        if self._store.has(url):
            return None
        got = await fetcher.fetch(url)
        if isinstance(got, NotFetched):
            return got
        self._store.put(*got)
        self._fetched += 1
        return None

    def _take(self, url: str, outcome: NotFetched | None) -> list[str]:
        """Write what a page gives; returns its links to pages of a known kind."""
        if outcome is not None:
            self._note(IndexLine(url=url, outcome=outcome.outcome, reason=outcome.reason))
            return []
        page, body = self._store.get(url)
        found, problem = self._read(url, page, body)
        talks = found.conversations[: None if self._limit is None else self._limit - self._written]
        for talk in talks:
            self._conversations.write(msgspec.json.encode(talk) + b"\n")
        self._written += len(talks)
        links = [link for link in found.links if self._description.kind_of(link) is not None]
        file = self._store.path_of(url)
        self._note(
            IndexLine(
                url=url,
                outcome="stored",
                page=page,
                file=f"pages/{file.parent.name}/{file.name}",
                links=len(links),
                conversations=len(talks),
                problem=problem,
            )
        )
        return links

    def _read(self, url: str, page: Page, body: bytes) -> tuple[Found, str]:
        kind = self._description.kind_of(url)
        if not page.is_good:
            return Found([], []), f"status {page.status}"
        if kind is None:
            return Found([], []), "a page of no kind"
        try:
            found = extract_page(*kind, url, page.final_url, body, self._description.name)
        except PageError as error:
            return Found([], []), error.message
        lacks = kind[0].conversations is not None and not found.conversations and not found.links
        return found, "no conversation in the page" if lacks else ""

    def _note(self, line: IndexLine) -> None:
        self._outcomes[line.outcome] += 1
        if line.problem:
            self._problems[line.problem] += 1
        if line.outcome != "stored" and len(self._failures) < 20:
            self._failures[line.url] = f"{line.outcome}: {line.reason}"
        self._index.write(msgspec.json.encode(line) + b"\n")
        if self._progress is not None:
            self._progress(sum(self._outcomes.values()), self._written)


__all__ = ["CollectReport", "collect_conversations"]
