"""`TokenizerFormat`: the chat template that a tokenizer brings along, as a `ChatFormat`.

Such a template writes text and says nothing of what the model generates (unless it has `{% generation %}`), so the replies are
found: reply k begins where the same template, asked for the prompt of the messages before it, ends. Invariants: the text is
exactly what the template writes for these messages, and every prompt is a beginning of it; where either does not hold, the
conversation is refused with the turn and the character. As in `ChatFormat`, message texts never become template text. It
ignores tools and documents, and gives the template no clock: the same conversation is the same text on every day.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import lru_cache
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chaccu.conversation.content import MARK, Contents
from chaccu.conversation.format import (
    GENERATION_BEGINS,
    GENERATION_ENDS,
    MARKS,
    ChatFormat,
    GenerationTag,
    Rendering,
    Segment,
    cut_windows,
    load_format,
    raise_template_error,
)
from chaccu.conversation.message import Conversation, check_conversation
from chaccu.errors import FormatError, UsageError

TOKENIZER_FORMAT = "tokenizer"
_TEMPLATE_FILE, _CONFIG_FILE, _TOKENIZER_FILE = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"
_SYSTEM = -1
_Turn = tuple[str, str]


class _Span(NamedTuple):
    """Characters `[start, end)`; `owner`: index of the message they belong to."""

    start: int
    end: int
    owner: int


class _Written(NamedTuple):
    """What a template wrote: the text, where messages' contents stand in it, and what it marks as generated."""

    text: str
    contents: list[_Span]
    generated: list[_Span]


class _Names(NamedTuple):
    bos_token: str
    eos_token: str


class TokenizerFormat(ChatFormat, frozen=True, kw_only=True):
    """A tokenizer's chat template. `special_tokens`: texts at the first of which the end of a turn ends."""

    special_tokens: tuple[str, ...] = ()

    def render(
        self,
        conversation: Conversation,
        *,
        pending: bool | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> Rendering:
        """As `ChatFormat.render`. Raises `FormatError` when the template refuses the conversation, or when its text does not
        begin with the prompt of one of its replies."""
        names = _Names(self.bos_token if bos_token is None else bos_token, self.eos_token if eos_token is None else eos_token)
        messages: list[_Turn] = [(message.role, message.content or "") for message in check_conversation(conversation).messages]
        awaited = conversation.is_pending if pending is None else pending
        if awaited and messages[-1][0] == "assistant":
            messages.pop()
        whole = self._write(conversation.system, messages, names, awaited=awaited)
        replies = [index for index, (role, _) in enumerate(messages) if role == "assistant"]
        if whole.generated and len(whole.generated) != len(replies):
            raise FormatError(
                f"format {self.name!r} marks {len(whole.generated)} texts as generated, and there are {len(replies)} replies.",
                remedy="enclose each reply once in {% generation %} … {% endgeneration %}",
            )
        begins = [self._find_begin(conversation.system, messages, turn, names, whole) for turn in replies]
        limits = [*begins[1:], len(whole.text)]
        spans = [
            self._find_reply(whole, number, turn, begin, limit, messages[turn][1], names)
            for number, (turn, begin, limit) in enumerate(zip(replies, begins, limits, strict=False))
        ]
        return cut_windows(_cut_segments(whole, spans), conversation.messages, self.name)

    def write_text(self, conversation: Conversation, *, pending: bool, bos_token: str = "", eos_token: str = "") -> str:
        """What the template writes, as other programs see it: the text alone, wherever its replies begin. Raises
        `FormatError`."""
        messages: list[_Turn] = [(message.role, message.content or "") for message in check_conversation(conversation).messages]
        if pending and messages[-1][0] == "assistant":
            messages.pop()
        turns = [("system", conversation.system), *messages] if conversation.system is not None else messages
        named = [{"role": role, "content": text} for role, text in turns]
        return self._fill(named, _Names(bos_token, eos_token), pending, marked=False)

    def _write(self, system: str | None, messages: list[_Turn], names: _Names, *, awaited: bool) -> _Written:
        contents = Contents()
        turns = [("system", system), *messages] if system is not None else messages
        first = _SYSTEM if system is not None else 0
        exact = self._fill([{"role": role, "content": text} for role, text in turns], names, awaited, marked=False)
        marked = self._fill(
            [{"role": role, "content": contents.add(text or "", owner)} for owner, (role, text) in enumerate(turns, first)],
            names,
            awaited,
            marked=True,
        )
        written = _resolve_marks(marked, contents)
        if written.text != exact:
            at = _first_difference(written.text, exact)
            raise FormatError(
                f"format {self.name!r} changes the text of a message in a way that cannot be followed, at character {at}: "
                f"{exact[at : at + 20]!r} where {written.text[at : at + 20]!r} would stand.",
                remedy="use a format by name (`chaccu format list`), or clean the text of the message",
            )
        return written

    def _fill(self, messages: list[dict[str, Any]], names: _Names, awaited: bool, *, marked: bool) -> str:
        try:
            return _compile(self.template, marked).render(
                messages=messages,
                add_generation_prompt=awaited,
                bos_token=names.bos_token,
                eos_token=names.eos_token,
                tools=None,
                documents=None,
                raise_exception=raise_template_error,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise FormatError(f"format {self.name!r} cannot render this conversation: {error}.") from error

    def _find_begin(self, system: str | None, messages: list[_Turn], turn: int, names: _Names, whole: _Written) -> int:
        """Where the reply at `turn` begins: at the end of the prompt that awaits it."""
        prompt = self._write(system, messages[:turn], names, awaited=True)
        before = [span for span in whole.contents if span.owner < turn]
        if whole.text.startswith(prompt.text) and before == prompt.contents:
            return len(prompt.text)
        at = _first_difference(whole.text, prompt.text)
        raise FormatError(
            f"format {self.name!r} does not keep the prompt of turn {turn}: at character {at} the prompt says "
            f"{prompt.text[at : at + 20]!r} and the whole conversation {whole.text[at : at + 20]!r}.",
            remedy="such a template cannot be trained with; use a format by name (`chaccu format list`)",
        )

    def _find_reply(
        self, whole: _Written, number: int, turn: int, begin: int, limit: int, content: str, names: _Names
    ) -> _Span:
        """The reply at `turn` with the end of its turn."""
        if whole.generated:
            marked = whole.generated[number]
            if marked.start != begin:
                raise FormatError(
                    f"format {self.name!r} marks turn {turn} from character {marked.start}, but its prompt ends at {begin}.",
                    remedy="begin {% generation %} where the generation prompt ends",
                )
            return _Span(begin, marked.end, number)
        ends = [span.end for span in whole.contents if span.owner == turn and begin <= span.start <= limit]
        if not ends and content.strip():
            raise FormatError(f"format {self.name!r} does not write the reply of turn {turn}.")
        end = max(ends, default=begin)
        turn_end = _find_turn_end(self, names)
        if not whole.text.startswith(turn_end, end):
            raise FormatError(
                f"format {self.name!r} ends turn {turn} with {whole.text[end : end + 20]!r} at character {end}, where it ends "
                f"others with {turn_end!r}.",
                remedy="use a format by name (`chaccu format list`)",
            )
        return _Span(begin, end + len(turn_end), number)


def load_template_format(source: Path | str, *, bos_token: str = "", eos_token: str = "") -> ChatFormat:
    """The chat template of a tokenizer: of a model folder, a tokenizer_config.json, a file with a template (all as `Path`), or
    the text of a template (as `str`).

    `bos_token` / `eos_token` stand in for those that no tokenizer_config.json names. Raises `FormatError` when there is no
    template, it is malformed, or it writes nothing after a reply.
    """
    template, config, special = (source, {}, []) if isinstance(source, str) else _read_template(source)
    chat_format = TokenizerFormat(
        name=TOKENIZER_FORMAT,
        template=template,
        description="The chat template that the tokenizer brings along.",
        bos_token=_token_text(config.get("bos_token")) or bos_token,
        eos_token=_token_text(config.get("eos_token")) or eos_token,
        special_tokens=tuple(special),
    )
    try:
        _compile(template, True)
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(f"the chat template of {_name_of(source)} is malformed: {error}.") from error
    stop = _find_turn_end(chat_format, _Names(chat_format.bos_token, chat_format.eos_token)).strip()
    return msgspec.structs.replace(chat_format, stop=(stop,) if stop else ())


def resolve_format(name: str, model_folder: Path | None = None) -> ChatFormat:
    """The format called `name`; `tokenizer` stands for the chat template in `model_folder`.

    Raises `UsageError` when there is no such format or no folder to read the template from, `FormatError` as
    `load_template_format` does.
    """
    if name != TOKENIZER_FORMAT:
        return load_format(name)
    if model_folder is None:
        raise UsageError(
            f"the format {name!r} is the chat template of a model's tokenizer, and no model folder is given.",
            remedy="name a folder, or a format out of `chaccu format list`",
        )
    return load_template_format(model_folder)


def read_template(folder: Path) -> str | None:
    """The chat template that a model's folder brings along; None without one. Raises `FormatError` when it cannot be read."""
    if not (folder / _TEMPLATE_FILE).is_file() and not (folder / _CONFIG_FILE).is_file():
        return None
    return _find_template(folder)[0] or None


def _read_template(path: Path) -> tuple[str, dict[str, Any], list[str]]:
    """As `_find_template`. Raises `FormatError` when there is none."""
    template, config, special = _find_template(path)
    if not template:
        raise FormatError(
            f"the tokenizer in {path} has no chat template.", remedy="use a format by name (`chaccu format list`)"
        )
    return template, config, special


def _find_template(path: Path) -> tuple[str, dict[str, Any], list[str]]:
    """The template, the tokenizer's configuration beside it and its special tokens."""
    folder = path if path.is_dir() else path.parent
    file = path
    if path.is_dir():
        file = next(
            (folder / name for name in (_TEMPLATE_FILE, _CONFIG_FILE) if (folder / name).is_file()), folder / _CONFIG_FILE
        )
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8")) if (folder / _CONFIG_FILE).is_file() else {}
        template = _pick_template(json.loads(text).get("chat_template")) if file.suffix == ".json" else text
        special = _read_special_tokens(folder / _TOKENIZER_FILE)
    except (OSError, ValueError, AttributeError) as error:
        raise FormatError(f"the chat template of {path} cannot be read: {error}.", remedy="name a model folder") from error
    return template, config, special


def _pick_template(value: Any) -> str:
    """A configuration names one template, or several of which `default` is for chat."""
    if isinstance(value, list):
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    return value if isinstance(value, str) else ""


def _read_special_tokens(file: Path) -> list[str]:
    if not file.is_file():
        return []
    tokens = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or []
    return [token["content"] for token in tokens if token.get("special")]


def _token_text(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _name_of(source: Path | str) -> str:
    return str(source) if isinstance(source, Path) else "the given text"


@lru_cache(maxsize=64)
def _find_turn_end(chat_format: TokenizerFormat, names: _Names) -> str:
    """What ends an assistant's turn: found by rendering one, up to its first special token or else without blank space."""
    probe = chat_format._write(None, [("user", "?"), ("assistant", "!")], names, awaited=False)
    written = max((span.end for span in probe.contents if span.owner == 1), default=0)
    tail = probe.text[written : probe.generated[-1].end if probe.generated else None]
    ends = [
        tail.index(token) + len(token) for token in (names.eos_token, *chat_format.special_tokens) if token and token in tail
    ]
    end = tail if probe.generated else tail[: min(ends)] if ends else tail.rstrip() or tail
    if not end:
        raise FormatError(
            f"format {chat_format.name!r} writes nothing after a reply: a model trained with it would not learn to stop.",
            remedy="use a format by name (`chaccu format list`)",
        )
    return end


def _resolve_marks(marked: str, contents: Contents) -> _Written:
    text: list[str] = []
    size = 0
    written = _Written("", [], [])
    begin = 0
    for piece in MARKS.split(marked):
        if piece == GENERATION_BEGINS:
            begin = size
        elif piece == GENERATION_ENDS:
            written.generated.append(_Span(begin, size, len(written.generated)))
        elif piece:
            owner = None
            if piece[0] == MARK:
                number = int(piece[1:-1])
                piece, owner = contents.texts[number], contents.owners[number]
                written.contents.append(_Span(size, size + len(piece), owner))
            text.append(piece)
            size += len(piece)
    return written._replace(text="".join(text))


def _cut_segments(whole: _Written, replies: list[_Span]) -> Rendering:
    contents = [span for span in whole.contents if span.end > span.start]
    bounds = {0, len(whole.text)}
    for span in (*contents, *replies):
        bounds |= {span.start, span.end}
    segments = [
        Segment(whole.text[start:end], _covering(contents, start) is not None, _covering(replies, start))
        for start, end in pairwise(sorted(bounds))
    ]
    return Rendering(tuple(segments))


def _covering(spans: list[_Span], position: int) -> int | None:
    """Owner of the one of the ordered `spans` that holds `position`."""
    index = bisect_right(spans, position, key=lambda span: span.start) - 1
    return spans[index].owner if index >= 0 and position < spans[index].end else None


def _first_difference(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class _UnmarkedGenerationTag(GenerationTag):
    """The tag's body alone."""

    def parse(self, parser: Parser) -> list[nodes.Node]:
        return super().parse(parser)[1:-1]


@lru_cache(maxsize=32)
def _compile(template: str, marked: bool) -> jinja2.Template:
    tag = GenerationTag if marked else _UnmarkedGenerationTag
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[tag, loopcontrols])
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
