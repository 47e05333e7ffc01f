"""`Description`: the YAML file that says where conversations are to be found, and how a page keeps them.

A `Pick` names values: by CSS selector in HTML, by JMESPath (`items[*].id`) in JSON, by a named group of the page's URL
pattern, or the thing itself. Invariant: what `load_description` returns has been checked: every pattern, selector and path
compiles, and every first URL belongs to a kind of page.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import yaml

from chaccu.artifact import storage_errors
from chaccu.errors import RecipeError


class Pick(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where values are. At most one of `css`, `json`, `group`; with none, the thing at hand. `attribute` takes an element's
    attribute in place of its text."""

    css: str | None = None
    attribute: str | None = None
    json: str | None = None
    group: str | None = None


class Link(Pick, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Values that lead to further pages. `url` holds `{}` where the value goes; without it the value is the URL, whole or
    relative to the page."""

    url: str = "{}"


class Next(Link, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The next page of a list: by a value found in it, as any link, or by `count`, a number in the query that grows by `step`
    as long as a page has links or conversations."""

    count: str | None = None
    step: int = 1


class Talk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Conversations in a page: `each` the conversations (the page itself is the one, without it), `turns` inside it, and of a
    turn `role` (without it, user and assistant take turns) and `text`. `roles` gives the site's names of roles their
    meaning."""

    turns: Pick
    each: Pick = Pick()
    role: Pick | None = None
    text: Pick = Pick()
    id: Pick | None = None
    system: Pick | None = None
    roles: dict[str, str] = {}


class Kind(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A kind of page: those whose whole URL matches `match`. `json_in`: CSS of the element whose text is the JSON in which
    every `json` of this kind looks."""

    match: str
    json_in: str | None = None
    links: list[Link] = []
    next: Next | None = None
    conversations: Talk | None = None


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`name` begins each conversation's `source`. `start`: first URLs; `start_file`: more of them, one a line. `rate`:
    requests a second to one host."""

    name: str
    pages: list[Kind]
    start: list[str] = []
    start_file: str | None = None
    rate: float = 1.0
    timeout_s: float = 30.0
    retries: int = 4
    max_page_bytes: int = 32 << 20

    def kind_of(self, url: str) -> tuple[Kind, dict[str, str]] | None:
        """The first kind of page that `url` is, with the pattern's named groups, or None."""
        for kind in self.pages:
            found = re.fullmatch(kind.match, url)
            if found is not None:
                return kind, {name: text or "" for name, text in found.groupdict().items()}
        return None


def load_description(path: Path, *, rate: float | None = None) -> Description:
    """The description in `path`, with the URLs of its `start_file` among its `start`, and `rate` in place of its own.

    Raises `StorageError` when a file cannot be read, `RecipeError` for bad YAML, an unknown key, a bad pattern, a first URL
    of no kind.
    """
    with storage_errors(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = msgspec.convert(yaml.safe_load(text), Description)
        if found.start_file is not None:
            found = msgspec.structs.replace(found, start=[*found.start, *_read_list(path.parent / found.start_file)])
        found = msgspec.structs.replace(found, rate=found.rate if rate is None else rate)
        _check(found)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise RecipeError(f"{path} describes no site: {error}.", remedy="see docs/collect.md for the form") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error.message}", remedy=error.remedy) from error
    return found


def _read_list(path: Path) -> list[str]:
    with storage_errors(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _check(description: Description) -> None:
    if not 0 < description.rate <= 1000:
        raise RecipeError(f"rate is {description.rate}; it must be above 0 and at most 1000.", remedy="1 is polite")
    if description.timeout_s <= 0 or description.retries < 0 or description.max_page_bytes <= 0:
        raise RecipeError("timeout_s and max_page_bytes must be above 0, and retries 0 or more.")
    for kind in description.pages:
        _check_kind(kind)
    if not description.start:
        raise RecipeError("there is no URL to start from.", remedy="give start: [URL, …] or start_file: FILE")
    for url in description.start:
        if description.kind_of(url) is None:
            raise RecipeError(
                f"no `match` of its pages is the whole of the first URL {url}.", remedy="mind dots and ?: \\. \\?"
            )


def _check_kind(kind: Kind) -> None:
    try:
        groups = set(re.compile(kind.match).groupindex)
    except re.error as error:
        raise RecipeError(f"match {kind.match!r} is no regular expression: {error}.") from error
    talk = kind.conversations
    picks = [*kind.links, kind.next, *((talk.each, talk.turns, talk.role, talk.text, talk.id, talk.system) if talk else ())]
    for pick in picks:
        if pick is not None:
            _check_pick(pick, groups)
    if kind.json_in is not None:
        _check_css(kind.json_in)
    if kind.next is not None and kind.next.count is None and kind.next == Next(url=kind.next.url):
        raise RecipeError(f"next of {kind.match!r} says nothing.", remedy="give css, json or count")


def _check_pick(pick: Pick, groups: set[str]) -> None:
    given = [name for name in ("css", "json", "group") if getattr(pick, name) is not None]
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)} stand together in one place.", remedy="give one of them")
    if pick.css is not None:
        _check_css(pick.css)
    if pick.json is not None:
        import jmespath

        try:
            jmespath.compile(pick.json)
        except (jmespath.exceptions.JMESPathError, ValueError) as error:
            raise RecipeError(f"json {pick.json!r} is no JMESPath: {str(error).splitlines()[0]}") from error
    if pick.group is not None and pick.group not in groups:
        raise RecipeError(f"the URL pattern has no group {pick.group!r}.", remedy=f"write (?P<{pick.group}>…) in match")
    if isinstance(pick, Link) and "{}" not in pick.url:
        raise RecipeError(f"url {pick.url!r} has no {{}} where the value goes.")


def _check_css(selector: str) -> None:
    from selectolax.lexbor import LexborHTMLParser, SelectolaxError

    try:
        LexborHTMLParser("<p></p>").css(selector)
    except SelectolaxError as error:
        raise RecipeError(f"css {selector!r} is no selector.") from error
