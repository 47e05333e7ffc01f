"""`ChatFormat`: the one renderer, from a conversation to prompt text, for training, serving and judging.

A format is one Jinja file under `formats/`: a YAML head (name, default system text, stop strings, special tokens) and a
template. The template always writes whole turns and encloses what the model generates (the reply with its end-of-turn text) in
`{% generation %}` … `{% endgeneration %}`; an awaited reply is rendered by cutting the text where its generation would
begin, so prompt and training text cannot part.

Invariant: message texts never pass through the template's text. An output expression that yields a message's content becomes a
numbered slot, so every character is known to be the template's or a message's, whatever the message contains.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources
from typing import Any, SupportsIndex

import jinja2
import msgspec
import yaml
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chaccu.conversation.message import Conversation, check_conversation
from chaccu.errors import FormatError, UsageError, did_you_mean

_GENERATION_BEGINS, _GENERATION_ENDS, _SLOT = "\x01", "\x02", "\x00"
_MARKS = re.compile(f"({_GENERATION_BEGINS}|{_GENERATION_ENDS}|{_SLOT}[0-9]+{_SLOT})")
_HEAD = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


class Segment(msgspec.Struct, frozen=True):
    """A run of rendered text.

    `content`: written by a message, not by the template. `reply`: number of the assistant reply (from 0) that generates this
    text, or None where the model only reads.
    """

    text: str
    content: bool
    reply: int | None


class Rendering(msgspec.Struct, frozen=True):
    """Rendered segments in order; `text` is their concatenation."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How one family of models writes a conversation.

    `stop`: strings at which a server ends an answer. `bos_token` / `eos_token`: what the template's variables of that name
    stand for when no tokenizer is given; with one, its own tokens take their place.
    """

    name: str
    template: str
    description: str = ""
    default_system: str = ""
    stop: tuple[str, ...] = ()
    bos_token: str = ""
    eos_token: str = ""

    def render(
        self,
        conversation: Conversation,
        *,
        pending: bool | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> Rendering:
        """Render `conversation`; where an answer is awaited, end where it would begin.

        `pending` None awaits an answer when the conversation does; True awaits one always (a finished last reply is taken
        as awaited). Raises `FormatError` when the template refuses the conversation.
        """
        messages = list(check_conversation(conversation).messages)
        awaited = conversation.is_pending if pending is None else pending
        texts = [(message.role, message.content or "") for message in messages]
        if awaited and messages[-1].role != "assistant":
            texts.append(("assistant", ""))
        contents: list[str] = []
        system = conversation.system if conversation.system is not None else self.default_system
        try:
            marked = _compile(self.template).render(
                slots=contents,
                system=_Content(system),
                messages=[{"role": role, "content": _Content(text)} for role, text in texts],
                bos_token=self.bos_token if bos_token is None else bos_token,
                eos_token=self.eos_token if eos_token is None else eos_token,
                raise_exception=_raise_exception,
            )
        except jinja2.TemplateError as error:
            raise FormatError(f"format {self.name!r} cannot render this conversation: {error}.") from error
        return _split_marks(marked, contents, cut_last=awaited)


class _Content(str):
    """A message's text inside a template: string methods keep the type, so it stays recognisable as content."""

    __slots__ = ()

    def strip(self, chars: str | None = None, /) -> _Content:
        return _Content(str.strip(self, chars))

    def lstrip(self, chars: str | None = None, /) -> _Content:
        return _Content(str.lstrip(self, chars))

    def rstrip(self, chars: str | None = None, /) -> _Content:
        return _Content(str.rstrip(self, chars))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> _Content:
        return _Content(str.replace(self, old, new, count))

    def __add__(self, other: Any) -> str:
        raise jinja2.TemplateRuntimeError("a message's content may not be joined to other text with '+'; write two expressions")

    __radd__ = __add__


class _GenerationTag(Extension):
    """`{% generation %}` … `{% endgeneration %}`: what the model writes."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration is a plain set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin = nodes.Output([nodes.TemplateData(_GENERATION_BEGINS)], lineno=line)
        end = nodes.Output([nodes.TemplateData(_GENERATION_ENDS)], lineno=line)
        return [begin, *body, end]


@jinja2.pass_context
def _to_slot(context: jinja2.runtime.Context, value: Any) -> Any:
    if not isinstance(value, _Content):
        return value
    slots = context["slots"]
    slots.append(str(value))
    return f"{_SLOT}{len(slots) - 1}{_SLOT}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        extensions=[_GenerationTag],
        finalize=_to_slot,
    )
    return environment.from_string(template)


def _split_marks(marked: str, contents: list[str], *, cut_last: bool) -> Rendering:
    segments: list[Segment] = []
    begun, inside = 0, False
    last = marked.count(_GENERATION_BEGINS)
    for piece in _MARKS.split(marked):
        if piece == _GENERATION_BEGINS:
            begun, inside = begun + 1, True
            if cut_last and begun == last:
                break
        elif piece == _GENERATION_ENDS:
            inside = False
        elif piece:
            content = piece[0] == _SLOT
            text = contents[int(piece[1:-1])] if content else piece
            if text:
                segments.append(Segment(text, content, begun - 1 if inside else None))
    return Rendering(tuple(segments))


def list_formats() -> list[str]:
    """Names of the shipped formats, sorted."""
    return sorted(entry.name[: -len(".jinja")] for entry in _folder().iterdir() if entry.name.endswith(".jinja"))


@lru_cache(maxsize=64)
def load_format(name: str) -> ChatFormat:
    """The shipped format called `name`. Raises `UsageError` with the nearest names when there is none."""
    file = _folder() / f"{name}.jinja"
    if not re.fullmatch(r"[\w.-]+", name) or not file.is_file():
        raise UsageError(f"there is no chat format {name!r}.", remedy=did_you_mean(name, list_formats()))
    return parse_format(file.read_text(encoding="utf-8"), name=name)


def parse_format(text: str, *, name: str) -> ChatFormat:
    """A format from the text of its file. Raises `FormatError` for a bad head or template."""
    head = _HEAD.match(text)
    if head is None:
        raise FormatError(f"format {name!r} has no head.", remedy="begin the file with --- YAML ---")
    try:
        fields = {"name": name, **yaml.safe_load(head[1]), "template": text[head.end() :]}
        chat_format = msgspec.convert(fields, ChatFormat)
        _compile(chat_format.template)
    except (yaml.YAMLError, msgspec.ValidationError, TypeError, jinja2.TemplateSyntaxError) as error:
        raise FormatError(f"format {name!r} is malformed: {error}.") from error
    if "endgeneration" not in chat_format.template:
        raise FormatError(
            f"format {name!r} marks no generated text.", remedy="enclose the reply in {% generation %} … {% endgeneration %}"
        )
    return chat_format


def _folder() -> Any:
    return resources.files("chaccu.conversation") / "formats"
