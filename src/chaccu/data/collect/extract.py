"""What a page holds: links to further pages, and conversations.

Invariants: equal bytes give equal findings. An assistant's turn taken from HTML stays HTML, inside one element of the class
`markdown`, by which the `html` step of the cleaning knows it; any other turn taken from HTML is its text, to the letter. What
comes out of JSON is untouched. A page that is not what its kind says raises `PageError`, which costs that page alone.
"""

from __future__ import annotations

import math
from functools import cached_property
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl, quote, urldefrag, urlencode, urljoin, urlsplit, urlunsplit

import jmespath
import msgspec
from selectolax.lexbor import LexborHTMLParser, LexborNode

from chaccu.data.collect.description import Kind, Link, Next, Pick, Talk
from chaccu.errors import DataError

_ASSISTANT = frozenset({"assistant", "gpt", "chatgpt", "bot", "model", "ai", "answer", "claude", "bard", "bing"})
_MOST_COUNTED = 10_000_000


class PageError(DataError):
    """A page is not of the form that its description says."""


class Found(msgspec.Struct, frozen=True):
    """Links in the order of the page, the next page of a list last; conversations in the order of the page."""

    links: list[str]
    conversations: list[dict[str, Any]]


def extract_page(kind: Kind, groups: dict[str, str], url: str, final_url: str, body: bytes, name: str) -> Found:
    """Links and conversations of the page `url`, that came from `final_url`. Raises `PageError`."""
    page = _Parsed(kind, groups, body)
    links = [link for pick in kind.links for link in page.follow(pick, final_url)]
    talks = _extract_talks(kind.conversations, page, url, name) if kind.conversations is not None else []
    if kind.next is not None:
        more = _count_on(kind.next, url) if kind.next.count is not None else page.follow(kind.next, final_url)
        links += more if kind.next.count is None or links or talks else []
    return Found(list(dict.fromkeys(links)), talks)


class _Parsed:
    """A page's bytes as HTML and as JSON, each parsed when it is first needed."""

    def __init__(self, kind: Kind, groups: dict[str, str], body: bytes) -> None:
        self._kind = kind
        self._groups = groups
        self._body = body

    @cached_property
    def tree(self) -> LexborNode:
        root = LexborHTMLParser(self._body).root
        if root is None:
            raise PageError("the page is no HTML.")
        return root

    @cached_property
    def document(self) -> Any:
        text: str | bytes = self._body
        if self._kind.json_in is not None:
            element = self.tree.css_first(self._kind.json_in)
            if element is None:
                raise PageError(f"the page has no element {self._kind.json_in!r} with its JSON.")
            text = element.text()
        try:
            return msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise PageError(f"the page's JSON cannot be read: {error}.") from error

    def pick(self, pick: Pick, place: Any = None) -> list[Any]:
        """The values of `pick` inside `place` (an element or a JSON value), or in the page itself."""
        if pick.group is not None:
            return [self._groups[pick.group]]
        if pick.json is not None:
            found = _search(pick.json, self.document if place is None or isinstance(place, LexborNode) else place)
            return found if isinstance(found, list) else [] if found is None else [found]
        if pick.css is not None:
            inside = place if isinstance(place, LexborNode) else self.tree
            nodes: list[Any] = list(inside.css(pick.css))
        else:
            nodes = [place]
        if pick.attribute is None:
            return nodes
        values = [node.attributes.get(pick.attribute) for node in nodes if isinstance(node, LexborNode)]
        return [value for value in values if value is not None]

    def follow(self, link: Link, base: str) -> list[str]:
        """The URLs of a link's values, whole and without fragment; values that make no URL are left out."""
        urls = []
        for value in self.pick(link):
            text = (_plain_text(value) or "").strip()
            if not text:
                continue
            try:
                url = urljoin(base, link.url.replace("{}", text if link.url == "{}" else quote(text, safe="")))
            except ValueError:
                continue
            urls.append(urldefrag(url).url)
        return urls


def _search(path: str, value: Any) -> Any:
    try:
        return jmespath.search(path, value)
    except (jmespath.exceptions.JMESPathError, RecursionError) as error:
        raise PageError(f"json {path!r} does not fit the page: {error}.") from error


def _plain_text(value: Any) -> str | None:
    """A text, a whole number or an element's text, as text."""
    if isinstance(value, LexborNode):
        return _text_of(value)
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, str)):
        return str(value)
    return str(int(value)) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else None


def _text_of(node: LexborNode) -> str:
    """An element's text to the letter, `<br>` as a line break."""
    pieces = []
    for inner in node.traverse(include_text=True):
        if inner.tag == "-text":
            pieces.append(inner.text_content or "")
        elif inner.tag == "br":
            pieces.append("\n")
    return "".join(pieces)


def _count_on(following: Next, url: str) -> list[str]:
    """The same URL with the number in its query moved on."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    now = next((value for key, value in query if key == following.count), "")
    number = (int(now) if now.isascii() and now.isdigit() and len(now) < 10 else 1) + following.step
    if not 0 <= number <= _MOST_COUNTED:
        return []
    others = [(key, value) for key, value in query if key != following.count]
    return [urlunsplit(parts._replace(query=urlencode([*others, (str(following.count), str(number))])))]


def _extract_talks(talk: Talk, page: _Parsed, url: str, name: str) -> list[dict[str, Any]]:
    talks = []
    places = page.pick(talk.each)
    for number, place in enumerate(places):
        turns = [_read_turn(talk, page, turn, index) for index, turn in enumerate(page.pick(talk.turns, place))]
        if not turns:
            continue
        found = page.pick(talk.id, place) if talk.id is not None else []
        own = blake2b(url.encode("utf-8", errors="surrogatepass"), digest_size=8).hexdigest()
        record_id = (_plain_text(found[0]) if found else None) or (own if len(places) == 1 else f"{own}-{number}")
        system = page.pick(talk.system, place) if talk.system is not None else []
        text = _plain_text(system[0]) if system else None
        head: dict[str, Any] = {"id": record_id, "source": f"{name}#{record_id}", "url": url}
        talks.append({**head, **({"system": text} if text else {}), "messages": turns})
    return talks


def _read_turn(talk: Talk, page: _Parsed, turn: Any, index: int) -> dict[str, Any]:
    """A turn as `{"role", "content"}`; content is None where there is no text, which the cleaning names in its ledger."""
    if talk.role is None:
        role = ("user", "assistant")[index % 2]
    else:
        found = page.pick(talk.role, turn)
        called = (_plain_text(found[0]) or "").strip() if found else ""
        role = talk.roles.get(called, called)
    texts = page.pick(talk.text, turn)
    if not texts:
        return {"role": role, "content": None}
    if isinstance(texts[0], LexborNode):
        is_answer = role.lower() in _ASSISTANT
        parts = [f'<div class="markdown">{node.inner_html or ""}</div>' if is_answer else _text_of(node) for node in texts]
        return {"role": role, "content": "".join(parts)}
    strings = [text for text in texts if isinstance(text, str)]
    return {"role": role, "content": "".join(strings) if len(strings) == len(texts) else None}
