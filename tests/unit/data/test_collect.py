"""What collecting decides without a network: descriptions, addresses, the pace, what a page holds, where pages are kept."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import chaccu.data.collect as collect
from chaccu.data.collect.addresses import RefusedAddressError, is_public, open_public_socket, refuse_url
from chaccu.data.collect.description import Description, load_description
from chaccu.data.collect.extract import Found, PageError, extract_page
from chaccu.data.collect.pace import HostPace, parse_retry_after, wait_before_retry
from chaccu.data.collect.store import Page, PageStore
from chaccu.errors import DataError, RecipeError, StorageError

EXAMPLES = sorted((Path(collect.__file__).parent / "examples").glob("*.yaml"))

SITE: dict[str, Any] = {
    "name": "site",
    "start": ["https://h.example/list"],
    "pages": [
        {"match": r"https://h\.example/list", "links": [{"css": "a", "attribute": "href"}]},
        {
            "match": r"https://h\.example/c/(?P<id>\w+)",
            "conversations": {
                "id": {"group": "id"},
                "turns": {"css": ".turn"},
                "role": {"attribute": "data-role"},
                "text": {"css": ".text"},
                "roles": {"me": "user"},
            },
        },
    ],
}


def describe(tmp_path: Path, **changes: Any) -> Description:
    """`SITE` with changes, by way of its file."""
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({**SITE, **changes}))
    return load_description(path)


def extract(kind: dict[str, Any], body: str, url: str = "https://h.example/list?page=1") -> Found:
    """What a page of one kind gives."""
    description = msgspec.convert({"name": "site", "pages": [{"match": ".*", **kind}]}, Description)
    found = description.kind_of(url)
    assert found is not None
    return extract_page(*found, url, url, body.encode(), "site")


# --- descriptions ---


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_hold(example: Path, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("# a list\nhttps://share.example/c/abc\n\n")
    copy = tmp_path / example.name
    copy.write_bytes(example.read_bytes())
    description = load_description(copy)
    assert description.start
    assert any(kind.conversations for kind in description.pages)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"start": []}, "no URL to start from"),
        ({"start": ["https://other.example/"]}, "no `match`"),
        ({"rate": 0}, "rate is 0"),
        ({"colour": "blue"}, "colour"),
        ({"retries": "many"}, "retries"),
        ({"pages": [{"match": "("}]}, "no regular expression"),
        ({"pages": [{"match": ".*", "links": [{"css": "..["}]}]}, "no selector"),
        ({"pages": [{"match": ".*", "links": [{"json": "a["}]}]}, "no JMESPath"),
        ({"pages": [{"match": ".*", "links": [{"json": "a", "css": "b"}]}]}, "stand together"),
        ({"pages": [{"match": ".*", "links": [{"json": "a", "url": "https://x/"}]}]}, "has no {}"),
        ({"pages": [{"match": ".*", "next": {}}]}, "says nothing"),
        ({"pages": [{"match": ".*", "conversations": {"turns": {"css": "p"}, "id": {"group": "id"}}}]}, "no group 'id'"),
    ],
)
def test_a_wrong_description_is_one_clear_error(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        describe(tmp_path, **changes)
    assert told in str(caught.value)
    assert "site.yaml" in str(caught.value)


def test_a_missing_list_of_urls_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.txt"):
        describe(tmp_path, start_file="nowhere.txt")


# --- addresses ---


@pytest.mark.parametrize(
    "url", ["ftp://h/x", "file:///etc/passwd", "https:///x", "javascript:alert(1)", "x", "http://[::1", "//h"]
)
def test_urls_that_are_not_fetched(url: str) -> None:
    assert refuse_url(url) is not None


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
    ],
)
def test_private_addresses_are_told_from_public_ones(address: str, public: bool) -> None:
    assert is_public(address) is public
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    info = (family, socket.SOCK_STREAM, 6, "", (address, 80))
    if public:
        open_public_socket(info).close()
    else:
        with pytest.raises(RefusedAddressError):
            open_public_socket(info)


# --- the pace ---


def test_requests_keep_their_distance_and_quiet_holds_for_all() -> None:
    pace = HostPace(2.0)
    assert pace.wait_s(100.0) <= 0
    pace.begin(100.0)
    assert pace.wait_s(100.5) == 1.5
    pace.be_quiet(101.0, 10.0)
    assert pace.wait_s(102.0) == 9.0
    pace.slow_to(5.0)
    pace.slow_to(1.0)
    pace.begin(111.0)
    assert pace.wait_s(111.0) == 5.0


def test_retries_wait_longer_each_time() -> None:
    assert [wait_before_retry(attempt) for attempt in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, 60.0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("7", 7.0),
        (" 0 ", 0.0),
        ("soon", None),
        ("-3", None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 60.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str | None, expected: float | None) -> None:
    assert parse_retry_after(value, 40.0) == expected


# --- pages ---


def test_turns_out_of_html(tmp_path: Path) -> None:
    page = """<html><body><div class=turn data-role=me><p class=who>Me</p><div class=text> a &lt;b&gt;<br>c</div></div>
    <div class=turn data-role=assistant><div class=text><p>Yes &amp; <b>no</b></p></div></div>
    <div class=turn data-role=assistant></div></body></html>"""
    description = describe(tmp_path)
    url = "https://h.example/c/ab1"
    found = description.kind_of(url)
    assert found is not None
    (talk,) = extract_page(*found, url, url, page.encode(), "site").conversations
    assert talk == {
        "id": "ab1",
        "source": "site#ab1",
        "url": url,
        "messages": [
            {"role": "user", "content": " a <b>\nc"},
            {"role": "assistant", "content": '<div class="markdown"><p>Yes &amp; <b>no</b></p></div>'},
            {"role": "assistant", "content": None},
        ],
    }


def test_turns_out_of_json_in_html_are_untouched() -> None:
    page = '<script id=d>{"talk": [{"v": " <p>x</p> "}, {"v": "y"}, {"v": 3}]}</script>'
    kind = {"json_in": "script#d", "conversations": {"turns": {"json": "talk"}, "text": {"json": "v"}}}
    (talk,) = extract(kind, page).conversations
    assert [(turn["role"], turn["content"]) for turn in talk["messages"]] == [
        ("user", " <p>x</p> "),
        ("assistant", "y"),
        ("user", None),
    ]


def test_several_conversations_a_page() -> None:
    kind = {
        "conversations": {
            "each": {"json": "items"},
            "id": {"json": "key"},
            "system": {"json": "system"},
            "turns": {"json": "turns"},
            "role": {"json": "r"},
            "text": {"json": "t"},
        }
    }
    body = '{"items": [{"key": 1, "system": "S", "turns": [{"r": "u", "t": "q"}]}, {"turns": [{"t": "q"}]}, {"turns": []}]}'
    first, second = extract(kind, body).conversations
    assert (first["id"], first["system"], first["source"]) == ("1", "S", "site#1")
    assert second["id"].endswith("-1")
    assert second["messages"] == [{"role": "", "content": "q"}]


def test_links_are_whole_and_each_once() -> None:
    body = '<a href="/c/1#top">1</a><a href="/c/1">1</a><a href="//o.example/x">o</a><a>none</a><a href="http://[bad">b</a>'
    assert extract({"links": [{"css": "a", "attribute": "href"}]}, body).links == [
        "https://h.example/c/1",
        "https://o.example/x",
    ]


def test_a_cursor_and_ids_go_into_urls() -> None:
    kind = {
        "links": [{"json": "ids", "url": "https://h.example/c/{}"}],
        "next": {"json": "cursor", "url": "https://h.example/list?cursor={}"},
    }
    links = extract(kind, '{"ids": ["a/b", 7, null, {}], "cursor": "x y="}').links
    assert links == ["https://h.example/c/a%2Fb", "https://h.example/c/7", "https://h.example/list?cursor=x%20y%3D"]
    assert extract(kind, '{"ids": [], "cursor": null}').links == []


@pytest.mark.parametrize(
    ("url", "following"),
    [
        ("https://h.example/list", "https://h.example/list?page=2"),
        ("https://h.example/list?page=9&q=a%20b", "https://h.example/list?q=a+b&page=10"),
        ("https://h.example/list?page=x", "https://h.example/list?page=2"),
    ],
)
def test_counted_pages_end_with_an_empty_one(url: str, following: str) -> None:
    kind = {"links": [{"json": "ids", "url": "/c/{}"}], "next": {"count": "page"}}
    assert extract(kind, '{"ids": [1]}', url).links == ["https://h.example/c/1", following]
    assert extract(kind, '{"ids": []}', url).links == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ({"links": [{"json": "a"}]}, "<html>"),
        ({"links": [{"json": "a"}]}, "[" * 5000),
        ({"links": [{"json": "length(a)"}]}, '{"a": 1}'),
        ({"json_in": "#gone", "links": [{"json": "a"}]}, "<p>"),
    ],
)
def test_a_page_of_another_form_costs_itself_alone(kind: dict[str, Any], body: str) -> None:
    with pytest.raises(PageError):
        extract(kind, body)


@pytest.mark.parametrize("body", ["", "\x00\x01", "<" * 1000, "<div class=turn>" * 3000, "null", "[]", '{"a": [[[]]]}'])
def test_odd_bytes_give_nothing(body: str) -> None:
    html = {"links": [{"css": "a", "attribute": "href"}], "conversations": {"turns": {"css": ".none"}}}
    assert extract(html, body) == Found([], [])


# --- the store ---


def test_a_page_is_kept_as_it_came(tmp_path: Path) -> None:
    store = PageStore(tmp_path)
    page = Page(url="https://h/ä?x=1", final_url="https://h/", status=200, fetched_at_s=1.5, headers={"etag": '"a"'})
    assert not store.has(page.url)
    store.put(page, b"\n\x00 body\n")
    assert store.has(page.url)
    assert store.get(page.url) == (page, b"\n\x00 body\n")
    store.path_of(page.url).write_bytes(b"rubbish")
    with pytest.raises(DataError, match="is damaged"):
        store.get(page.url)
