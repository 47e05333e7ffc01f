"""`ChatFormat`: the one renderer, from a conversation to prompt text, for training, serving and judging.

A format is one Jinja file under `formats/`: a YAML head (description, default system text, stop strings, special tokens) and a
template, or the name of the format whose template it shares (`like`). The template always writes whole turns and encloses what
the model generates (the reply with its end-of-turn text) in `{% generation %}` … `{% endgeneration %}`; an awaited reply is
rendered by cutting the text where its generation would begin, so prompt and training text cannot part.

Invariant: message texts never pass through the template's text. They are `Content`s: the template writes their numbered
marks, so every character is known to be the template's or a message's, whatever the message contains. The format's own default
system text counts as the template's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

import jinja2
import msgspec
import yaml
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chaccu.conversation.content import MARK, Contents
from chaccu.conversation.message import Conversation, Message, check_conversation
from chaccu.errors import FormatError, UsageError, did_you_mean

GENERATION_BEGINS, GENERATION_ENDS = "\x01", "\x02"
MARKS = re.compile(f"({GENERATION_BEGINS}|{GENERATION_ENDS}|{MARK}[0-9]+{MARK})")
_FILTERS = ("trim", "upper", "lower", "length", "first", "last", "default")
_HEAD = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


class Segment(msgspec.Struct, frozen=True):
    """A run of rendered text; an empty one stands for a reply of which nothing is written, not even an end.

    `content`: written by a message, not by the template. `reply`: number of the assistant reply (from 0) that generates this
    text, or None where the model only reads. `trained` is false for what another window of the same reply trains.
    """

    text: str
    content: bool
    reply: int | None
    trained: bool = True


class Rendering(msgspec.Struct, frozen=True):
    """Rendered segments in order; `text` is their concatenation."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How one family of models writes a conversation.

    `stop`: strings at which a server ends an answer. `stop_token_ids`: the ids that say the same in the vocabulary of the
    models that the format was published with; in another vocabulary they mean nothing, and `stop` does the work. `bos_token` /
    `eos_token`: what the template's variables of that name stand for when no tokenizer is given; with one, its own tokens take
    their place.
    """

    name: str
    template: str
    description: str = ""
    default_system: str = ""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
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
        contents = Contents()
        try:
            marked = _compile(self.template).render(
                system=self.default_system if conversation.system is None else contents.add(conversation.system, -1),
                messages=[{"role": role, "content": contents.add(text, index)} for index, (role, text) in enumerate(texts)],
                bos_token=self.bos_token if bos_token is None else bos_token,
                eos_token=self.eos_token if eos_token is None else eos_token,
                raise_exception=raise_template_error,
            )
        except jinja2.TemplateError as error:
            raise FormatError(f"format {self.name!r} cannot render this conversation: {error}.") from error
        return cut_windows(_split_marks(marked, contents.texts, cut_last=awaited), messages, self.name)


class GenerationTag(Extension):
    """`{% generation %}` … `{% endgeneration %}`: what the model writes."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration is a plain set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin = nodes.Output([nodes.TemplateData(GENERATION_BEGINS)], lineno=line)
        end = nodes.Output([nodes.TemplateData(GENERATION_ENDS)], lineno=line)
        return [begin, *body, end]


def raise_template_error(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        extensions=[GenerationTag],
    )
    # Only the filters that keep a content a content: any other would write its mark wrong, without a word.
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    return environment.from_string(template)


def _split_marks(marked: str, contents: list[str], *, cut_last: bool) -> Rendering:
    segments: list[Segment] = []
    begun, inside = 0, False
    last = marked.count(GENERATION_BEGINS)
    for piece in MARKS.split(marked):
        if piece == GENERATION_BEGINS:
            begun, inside = begun + 1, True
            if cut_last and begun == last:
                break
        elif piece == GENERATION_ENDS:
            if segments[-1:] == [] or segments[-1].reply != begun - 1:
                segments.append(Segment("", False, begun - 1))
            inside = False
        elif piece:
            content = piece[0] == MARK
            text = contents[int(piece[1:-1])] if content else piece
            if text:
                segments.append(Segment(text, content, begun - 1 if inside else None))
    return Rendering(tuple(segments))


def cut_windows(rendering: Rendering, messages: Sequence[Message], name: str) -> Rendering:
    """`rendering` of `messages` with the characters of a windowed reply told apart that are not trained, and nothing behind an
    unfinished one. Raises `FormatError` when format `name` has changed such a reply's text beyond its blank margins."""
    if not any(message.trained_from or message.unfinished for message in messages):
        return rendering
    segments = list(rendering.segments)
    for reply, message in enumerate(message for message in messages if message.role == "assistant"):
        places = [place for place, segment in enumerate(segments) if segment.content and segment.reply == reply]
        if not places or not (message.trained_from or message.unfinished):
            continue
        place, content = places[0], message.content or ""
        text = segments[place].text
        if len(places) > 1 or text not in (content, content.strip()):
            raise FormatError(
                f"format {name!r} changes the text of reply {reply}, which is trained only in part.",
                remedy="split the conversation for the format that it is trained with",
            )
        read = max(0, message.trained_from - content.index(text))
        if message.unfinished:
            del segments[place + 1 :]
        parts = [Segment(part, True, reply, trained) for part, trained in ((text[:read], False), (text[read:], True)) if part]
        segments[place : place + 1] = parts
        # What the template writes of the reply before its text is read with it.
        for before in range(place):
            if read and segments[before].reply == reply:
                segments[before] = msgspec.structs.replace(segments[before], trained=False)
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
        fields = {"name": name, **yaml.safe_load(head[1])}
        template = text[head.end() :]
        if "like" in fields:
            fields = _share_template(fields, template)
        else:
            fields["template"] = template
        chat_format = msgspec.convert(fields, ChatFormat)
        _compile(chat_format.template)
    except (yaml.YAMLError, msgspec.ValidationError, TypeError, jinja2.TemplateSyntaxError) as error:
        raise FormatError(f"format {name!r} is malformed: {error}.") from error
    if "endgeneration" not in chat_format.template:
        raise FormatError(
            f"format {name!r} marks no generated text.", remedy="enclose the reply in {% generation %} … {% endgeneration %}"
        )
    return chat_format


def _share_template(fields: dict[str, Any], template: str) -> dict[str, Any]:
    """The fields of the format that the head is `like`, with the head's own in front of them."""
    name, like = fields["name"], str(fields.pop("like"))
    if template.strip():
        raise FormatError(f"format {name!r} is like {like!r} and has a template too.", remedy="leave one of them out")
    if like == name or like not in list_formats():
        others = [known for known in list_formats() if known != name]
        raise FormatError(f"format {name!r} is like {like!r}, which is no other format.", remedy=did_you_mean(like, others))
    return {**msgspec.structs.asdict(load_format(like)), **fields}


def _folder() -> Any:
    return resources.files("chaccu.conversation") / "formats"
