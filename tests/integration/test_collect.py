"""Collecting from a site of our own that misbehaves as sites do: the walk, robots.txt, the pace, faults, and kill -9."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from aiohttp import web

from chaccu.data.clean import clean_conversations
from chaccu.data.collect.description import Description, load_description
from chaccu.data.collect.run import CollectReport, collect_conversations
from chaccu.data.collect.store import PageStore
from chaccu.data.records import read_conversations
from chaccu.errors import DataError, UsageError
from chaccu.testing.processes import start_command

TALKS = 30
ROBOTS = "User-agent: *\nDisallow: /private/\nDisallow: /*?secret\n\nUser-agent: Others\nDisallow: /\n"


class ShareSite:
    """A share site on loopback, in a thread of its own. `log` holds time, path with query and user agent of each request."""

    def __init__(self) -> None:
        self.log: list[tuple[float, str, str]] = []
        self.robots_status = 200
        self._tries: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> ShareSite:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def forget(self) -> None:
        """As if it had just begun: faults come again."""
        self.log.clear()
        self._tries.clear()

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.log if path != "/robots.txt"]

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._remember])
        app.add_routes(
            [
                web.get("/robots.txt", self._robots),
                web.get("/explore", self._explore),
                web.get("/c/{id}", self._talk_page),
                web.get("/api/talks", self._api_list),
                web.get("/api/talks/{id}", self._api_talk),
                web.get("/old/{id}", self._moved),
                web.get("/private/{id}", self._talk_page),
                web.get("/away", self._away),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    @web.middleware
    async def _remember(self, request: web.Request, handler: Callable[..., Coroutine[Any, Any, Any]]) -> web.StreamResponse:
        self.log.append((time.monotonic(), request.path_qs, request.headers["User-Agent"]))
        self._tries[request.path_qs] += 1
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _robots(self, _: web.Request) -> web.Response:
        return web.Response(status=self.robots_status, text=ROBOTS)

    async def _explore(self, request: web.Request) -> web.Response:
        page = int(request.query.get("page", "1"))
        numbers = range((page - 1) * 10, min(page * 10, TALKS))
        links = [f'<a class=talk href="/c/t{number}?x=1#end">{number}</a>' for number in numbers]
        links += ['<a class=talk href="/private/t3">p</a>', '<a class=talk href="/c/t4?secret">s</a>']
        links += [
            '<a class=talk href="/c/gone">g</a>',
            '<a class=talk href="/old/t5">o</a>',
            '<a class=talk href="/away">w</a>',
        ]
        more = f'<a rel=next href="?page={page + 1}">more</a>' if page * 10 < TALKS else ""
        return web.Response(
            text=f"<html><body>{''.join(links)}{more}<a href='/login'>log in</a></body></html>", content_type="text/html"
        )

    async def _moved(self, request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": f"/c/{request.match_info['id']}?moved"})

    async def _away(self, _: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/private/t9"})

    async def _talk_page(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["id"]
        if name == "gone":
            return web.Response(status=404, text="gone")
        first = self._tries[request.path_qs] == 1
        if first and name == "t2":
            return web.Response(status=429, headers={"Retry-After": "1"})
        if first and name == "t7":
            return web.Response(status=500)
        body = (
            f"<html><div class=message data-role=human><div class=text>Question {name}: 1 &lt; 2?</div></div>"
            f'<div class=message data-role=bot><div class="text markdown"><p>Answer <b>{name}</b> about '
            f"{' '.join(f'{name}-{place}' for place in range(30))}.</p></div></div></html>"
        ).encode()
        if first and name in ("t11", "t12"):
            # Less than was promised, or too slowly.
            answer = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "text/html"})
            await answer.prepare(request)
            await answer.write(body[:50])
            if name == "t12":
                await asyncio.sleep(3)
            assert request.transport is not None
            request.transport.close()
            return answer
        return web.Response(body=body, content_type="text/html")

    async def _api_list(self, request: web.Request) -> web.Response:
        begin = int(request.query.get("cursor", "0"))
        end = min(begin + 7, TALKS)
        return web.json_response({"items": [{"id": f"a{n}"} for n in range(begin, end)], "next": end if end < TALKS else None})

    async def _api_talk(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        turns = [{"role": "user", "content": f"Question {name}?"}, {"role": "assistant", "content": f"<p>Answer {name}.</p>"}]
        return web.json_response({"id": name, "messages": turns})


@pytest.fixture(scope="module")
def running_site() -> Iterator[ShareSite]:
    with ShareSite() as site:
        yield site


@pytest.fixture
def site(running_site: ShareSite) -> ShareSite:
    running_site.robots_status = 200
    running_site.forget()
    return running_site


def write_pages(folder: Path, site: ShareSite, **changes: Any) -> Path:
    """The description of the site's pages."""
    host = site.url.replace(".", r"\.")
    description = {
        "name": "share",
        "start": [f"{site.url}/explore"],
        "rate": 200,
        "timeout_s": 1,
        "pages": [
            {
                "match": rf"{host}/explore(\?page=\d+)?",
                "links": [{"css": "a.talk", "attribute": "href"}],
                "next": {"css": "a[rel=next]", "attribute": "href"},
            },
            {
                "match": rf"{host}/(c|old|private|away)(/(?P<id>\w+).*)?",
                "conversations": {
                    "id": {"group": "id"},
                    "turns": {"css": ".message"},
                    "role": {"attribute": "data-role"},
                    "text": {"css": ".text"},
                    "roles": {"human": "user", "bot": "assistant"},
                },
            },
        ],
        **changes,
    }
    path = folder / "share.yaml"
    path.write_text(yaml.safe_dump(description))
    return path


def write_api(folder: Path, site: ShareSite) -> Path:
    """The description of the site's API."""
    host = site.url.replace(".", r"\.")
    description = {
        "name": "api",
        "start": [f"{site.url}/api/talks"],
        "rate": 500,
        "pages": [
            {
                "match": rf"{host}/api/talks(\?cursor=\d+)?",
                "links": [{"json": "items[*].id", "url": f"{site.url}/api/talks/{{}}"}],
                "next": {"json": "next", "url": f"{site.url}/api/talks?cursor={{}}"},
            },
            {
                "match": rf"{host}/api/talks/\w+",
                "conversations": {
                    "id": {"json": "id"},
                    "turns": {"json": "messages"},
                    "role": {"json": "role"},
                    "text": {"json": "content"},
                },
            },
        ],
    }
    path = folder / "api.yaml"
    path.write_text(yaml.safe_dump(description))
    return path


def collect(description: Path | Description, out: Path, **options: Any) -> CollectReport:
    loaded = description if isinstance(description, Description) else load_description(description)
    return collect_conversations(loaded, out, allow_private=True, **options)


def read_ids(out: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (out / "conversations.jsonl").read_text().splitlines()]


def test_pages_are_walked_faults_are_tried_again_and_nothing_is_silent(site: ShareSite, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = collect(write_pages(tmp_path, site), out, contact="me@example.org")
    assert report.conversations == TALKS + 1
    assert sorted(read_ids(out)) == sorted(["t5", *(f"t{number}" for number in range(TALKS))])
    assert report.outcomes == {"disallowed": 3, "stored": 3 + TALKS + 2}
    assert report.urls == sum(report.outcomes.values())
    assert report.problems == {"status 404": 1}
    assert len(report.warnings()) == 2
    assert not any(path.startswith("/private") or "secret" in path or path == "/login" for path in site.paths)
    assert {agent for _, _, agent in site.log} == {f"Chaccu/{version('chaccu')} (+me@example.org)"}
    tries = Counter(site.paths)
    assert {path for path, count in tries.items() if count > 1} == {f"/c/t{number}?x=1" for number in (2, 7, 11, 12)}
    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert len(index) == report.urls
    stored = next(line for line in index if line["url"].endswith("/c/t2?x=1"))
    assert stored["page"]["status"] == 200
    assert stored["page"]["headers"]["content-type"].startswith("text/html")
    assert (out / stored["file"]).is_file()


def test_quiet_that_is_asked_for_is_kept(site: ShareSite, tmp_path: Path) -> None:
    collect(write_pages(tmp_path, site), tmp_path / "out")
    times = [(at, path) for at, path, _ in site.log]
    (told, again) = (at for at, path in times if path == "/c/t2?x=1")
    assert again - told >= 1.0
    # What was on its way when the answer came does not count.
    assert [path for at, path in times if told + 0.2 < at < told + 0.95] == []


def test_the_pace_is_kept(site: ShareSite, tmp_path: Path) -> None:
    description = load_description(write_pages(tmp_path, site), rate=20)
    collect(description, tmp_path / "out", limit=5)
    starts = [at for at, _, _ in site.log]
    assert len(starts) > 6
    assert (starts[-1] - starts[0]) / (len(starts) - 1) >= 0.05 * 0.95


def test_what_was_collected_is_cleaned_to_markdown(site: ShareSite, tmp_path: Path) -> None:
    collect(write_pages(tmp_path, site), tmp_path / "out")
    report = clean_conversations([str(tmp_path / "out" / "conversations.jsonl")], tmp_path / "data", validation_share=0)
    assert report.read == TALKS + 1
    assert report.dropped == {"exact_duplicates": {"exact duplicate": 1}} or report.kept == TALKS
    first = next(iter(read_conversations(tmp_path / "data" / "train.jsonl")))
    assert first.source == "share#t0"
    assert first.messages[0].content == "Question t0: 1 < 2?"
    assert (first.messages[1].content or "").startswith("Answer **t0** about")


def test_an_api_is_paged_to_its_end_and_a_limit_ends_it_early(site: ShareSite, tmp_path: Path) -> None:
    report = collect(write_api(tmp_path, site), tmp_path / "all")
    assert report.conversations == TALKS
    assert read_ids(tmp_path / "all")[:3] == ["a0", "a1", "a2"]
    site.forget()
    collect(write_api(tmp_path, site), tmp_path / "some", limit=9)
    assert len(read_ids(tmp_path / "some")) == 9
    assert len(site.paths) < TALKS
    collect(write_api(tmp_path, site), tmp_path / "some")
    assert read_ids(tmp_path / "some") == read_ids(tmp_path / "all")
    assert max(Counter(site.paths).values()) == 1


def test_a_finished_run_asks_for_nothing_and_a_new_description_reads_the_old_pages(site: ShareSite, tmp_path: Path) -> None:
    path, out = write_api(tmp_path, site), tmp_path / "out"
    collect(path, out)
    before = (out / "conversations.jsonl").read_bytes()
    site.forget()
    report = collect(path, out)
    assert (site.log, report.requests, report.fetched) == ([], 0, 0)
    assert (out / "conversations.jsonl").read_bytes() == before
    changed = msgspec.structs.replace(load_description(path), name="renamed")
    collect(changed, out)
    assert site.log == []
    assert json.loads((out / "conversations.jsonl").read_text().splitlines()[0])["source"] == "renamed#a0"


@pytest.mark.parametrize("pages_before_kill", [1, 6, 20, 31])
def test_kill_and_go_on_gives_the_same_and_fetches_nothing_twice(
    site: ShareSite, tmp_path: Path, pages_before_kill: int
) -> None:
    collect(write_pages(tmp_path, site), tmp_path / "whole")
    site.forget()
    slow, out = write_pages(tmp_path, site, rate=40), tmp_path / "killed"
    arguments = ["data", "collect", str(slow), "--out", str(out), "--allow-private"]
    process = start_command(tmp_path / "logs", arguments)
    deadline_s = time.monotonic() + 60
    while len(list(out.glob("pages/*/*.page"))) < pages_before_kill:
        assert process.exit_code is None, process.log
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.kill()
    time.sleep(0.1)
    store = PageStore(out / "pages")
    asked = set(site.paths)
    stored = {path for path in asked if store.has(site.url + path)}
    assert len(stored) >= pages_before_kill
    assert not (out / "conversations.jsonl").exists()
    sent = len(site.log)
    again = start_command(tmp_path / "logs", arguments)
    assert again.wait(60) == 0, again.log
    assert stored.isdisjoint(path for _, path, _ in site.log[sent:])
    for name in ("conversations.jsonl",):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["conversations.jsonl", "index.jsonl", "pages", "report.json"]


def test_private_addresses_are_refused_unless_allowed(site: ShareSite, tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "2130706433", "①②⑦.0.0.1"):
        url = site.url.replace("127.0.0.1", host)
        description = Description(
            name="x", start=[f"{url}/api/talks"], rate=100, pages=load_description(write_api(tmp_path, site)).pages
        )
        with pytest.raises(DataError, match=r"private address|not a canonical"):
            collect_conversations(description, tmp_path / f"out-{host}")
    assert site.log == []


def test_nothing_is_fetched_where_robots_txt_cannot_be_had(site: ShareSite, tmp_path: Path) -> None:
    site.robots_status = 503
    with pytest.raises(DataError, match=r"robots\.txt"):
        collect(write_pages(tmp_path, site, retries=1), tmp_path / "out")
    assert site.paths == []
    site.robots_status = 404
    assert collect(write_api(tmp_path, site), tmp_path / "out").conversations == TALKS


def test_a_folder_of_something_else_is_left_alone(site: ShareSite, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UsageError, match="no collection"):
        collect(write_api(tmp_path, site), tmp_path / "out")
    assert site.log == []
