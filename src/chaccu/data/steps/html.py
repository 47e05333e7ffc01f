"""HTML answers to Markdown; every other text, and all text of users, stays byte for byte.

An answer is HTML when it is the page's own element (a first tag whose class names "markdown") or nothing but prose elements
from its first character to its last. Answers that merely talk about HTML are neither. Code blocks do not pass through the
converter: each is taken out with its exact text and language, and put back as a fence once the rest is Markdown; the page's
buttons and labels go.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from chaccu.conversation import Conversation, Message
from chaccu.data.outcome import Changed, Drop, Outcome, Step
from chaccu.data.rounds import Round, join_rounds, split_rounds

_PAGE_ELEMENT = re.compile(r"""\s*<[a-z][a-z0-9]*\b[^>]*\bclass\s*=\s*["'][^"'>]*\bmarkdown\b""", re.IGNORECASE)
_PROSE = "p|ul|ol|pre|h[1-6]|table|blockquote"
_PROSE_ONLY = re.compile(rf"\s*<({_PROSE})(?:\s[^>]*)?>.*</(?:{_PROSE})>\s*", re.IGNORECASE | re.DOTALL)
_LANGUAGE = re.compile(r"\b(?:language|lang)-([\w+#.-]+)")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")
_BLOCK_TAG = re.compile(r"<(/?)(?:div|ul|ol|li|dl|dd|blockquote|table|section|article)\b", re.IGNORECASE)
_NO_QUOTE_MARK = re.compile(r"[^>]")
_NOT_TEXT = ("button", "svg", "script", "style")
_NEEDS_TREE = re.compile(rf"<(?:pre|{'|'.join(_NOT_TEXT)})\b", re.IGNORECASE)
_BACKTICKS = re.compile(r"`{3,}")

# The converter leaves out, without a word, what is nested deeper than some hundreds of elements.
MAX_NESTING = 100
_CONVERTED = "HTML answer to Markdown"
_NOT_WHOLE = "HTML that Markdown cannot hold whole"


class Html(Step, frozen=True):
    """No settings."""

    name: ClassVar[str] = "html"

    def __call__(self, conversation: Conversation) -> Outcome:
        if not any(message.role == "assistant" and is_html(message.content or "") for message in conversation.messages):
            return conversation
        found = split_rounds(conversation.messages)
        rounds = [_convert_round(turns) for turns in found]
        kept = [turns for turns in rounds if turns is not None]
        if not kept:
            return Drop(_NOT_WHOLE)
        converted = any(after not in (None, before) for before, after in zip(found, rounds, strict=True))
        reasons = (_CONVERTED,) * converted + (_NOT_WHOLE,) * (len(kept) < len(rounds))
        return Changed((join_rounds(conversation, kept),), reasons)


def _convert_round(turns: Round) -> Round | None:
    """The round with its HTML answers as Markdown, or None when one of them cannot be."""
    converted = []
    for message in turns:
        if message.role == "assistant" and is_html(message.content or ""):
            text = html_to_markdown(message.content or "")
            if text is None:
                return None
            message = Message("assistant", text)
        converted.append(message)
    return tuple(converted)


def _nesting(html: str) -> int:
    """The greatest number of block elements open at once."""
    depth = deepest = 0
    for found in _BLOCK_TAG.finditer(html):
        depth += -1 if found[1] else 1
        deepest = max(deepest, depth)
    return deepest


def is_html(text: str) -> bool:
    """Whether a text is the HTML of an answer rather than Markdown or plain text that may mention HTML."""
    if not text.lstrip().startswith("<"):
        return False
    if _PAGE_ELEMENT.match(text):
        return True
    return "```" not in text and _PROSE_ONLY.fullmatch(text) is not None


def html_to_markdown(html: str) -> str | None:
    """Markdown of an answer's HTML: code exact and fenced with its language, runs of blank lines outside code made one.

    None when a part would be lost on the way.
    """
    if html.count("<") > MAX_NESTING and _nesting(html) > MAX_NESTING:
        return None
    if _NEEDS_TREE.search(html) is None:
        return _BLANK_LINES.sub("\n\n", _convert(html)).strip("\n")
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(html)
    # A character that the text does not hold, out of those that no text has a use for.
    mark = next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in html)
    blocks: list[str] = []
    # Elements by tag name: a CSS query takes longer than parsing.
    for node in tree.tags("pre"):
        fence = _fence_of(node)
        if fence is None:
            node.decompose()
            continue
        # Text in a paragraph of its own: the converter gives it the place and the indentation that the block is to have.
        place = tree.create_node("p")
        place.inner_html = f"{mark}{len(blocks)}{mark}"
        node.replace_with(place)
        blocks.append(fence)
    for tag in _NOT_TEXT:
        for node in tree.tags(tag):
            node.decompose()
    body = tree.body
    inner = body.inner_html if body is not None else None
    placed = _place_blocks(_BLANK_LINES.sub("\n\n", _convert(inner or "")), mark, blocks)
    return None if placed is None else placed.strip("\n")


def _convert(html: str) -> str:
    from html_to_markdown import convert

    # Without options: the wrapper turns them over anew for every call, which takes longer than the conversion.
    return convert(html).content or ""


def _place_blocks(text: str, mark: str, blocks: list[str]) -> str | None:
    """Put each block where its placeholder stands, behind the same quote marks and indentation; None when one is not there."""
    pieces = text.split(mark)
    if pieces[1::2] != [str(number) for number in range(len(blocks))] or len(pieces) != 2 * len(blocks) + 1:
        return None
    placed = [pieces[0]]
    for block, after in zip(blocks, pieces[2::2], strict=True):
        margin = _NO_QUOTE_MARK.sub(" ", placed[-1].rpartition("\n")[2])
        placed.append(block.replace("\n", "\n" + margin) if margin.strip() else _indent(block, margin))
        placed.append(after.lstrip(" "))
    return "".join(placed)


def _indent(block: str, margin: str) -> str:
    first, *others = block.split("\n")
    return "\n".join([first, *(margin + line if line else line for line in others)])


def _fence_of(pre: Any) -> str | None:
    """The fenced code of a <pre>, or None when it holds none."""
    code = pre.css_first("code") or pre
    text = code.text(deep=True, separator="", strip=False)
    if not text.strip():
        return None
    found = _LANGUAGE.search(code.attributes.get("class") or "")
    language = found[1] if found else ""
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}"
