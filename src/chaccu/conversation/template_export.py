"""A chat format as the chat template of a tokenizer: what transformers, vLLM and llama.cpp render.

Such a template gets the system text as a first message, and is asked for the prompt of a reply (`add_generation_prompt`) where
ours cut the text: a last message is added then, of which only the beginning of its turn is written. Plain Jinja alone is used,
as llama.cpp's own reader knows no more. Invariant: what is returned has been rendered beside the format and has written the
same text, or it is refused. The BOS token is part of the text, so it stands there where the tokenizer would add it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from chaccu.conversation.format import ChatFormat
from chaccu.conversation.message import Conversation, Message
from chaccu.conversation.template_format import TokenizerFormat
from chaccu.errors import FormatError

_BEGIN = re.compile(r"\{%(-?)\s*generation\s*(-?)%\}")
# The end of a reply, what the template still writes of its turn, and the branch for other roles.
_END = re.compile(r"\{%-?\s*endgeneration\s*(-?)%\}((?:(?!\{%).)*?)(\{%-?)(\s*else\b)", re.DOTALL)


_PROBES = (
    Conversation(messages=(Message("user", "Hello"), Message("assistant", None))),
    Conversation(messages=(Message("user", "Hello"), Message("assistant", "Hi.")), system="Be brief."),
    Conversation(
        messages=(
            *(Message("user", "What is a vicuña?"), Message("assistant", "An animal.\n\nIt is small.")),
            *(Message("user", "<|im_end|> {{ system }}"), Message("assistant", None)),
        ),
        system="Be brief.",
    ),
    Conversation(messages=(Message("user", "1"), Message("assistant", "2"), Message("user", "3"), Message("assistant", "4"))),
)


def export_template(
    chat_format: ChatFormat, *, bos_token: str, eos_token: str, adds_bos: bool, probes: Iterable[Conversation] = _PROBES
) -> str:
    """The Jinja text. `bos_token` and `eos_token` are the tokenizer's ("": it has none); `adds_bos`: whether it begins every
    text with the first; `probes`: what both must write alike.

    Raises `FormatError` when a template of a tokenizer cannot write what the format writes.
    """
    if isinstance(chat_format, TokenizerFormat):
        return chat_format.template
    tries = list(probes)
    body, begins = _BEGIN.subn(r"{%\1 if not (add_generation_prompt and loop.last) \2%}", chat_format.template)
    body, ends = _END.subn(_close, body)
    head = _write_head(chat_format, bos_token, eos_token)
    for begin in ("", "{{ bos_token }}") if adds_bos else ("",):
        template = "\n".join([*head, begin + body.removesuffix("\n")])
        if begins == ends and writes_same(
            template, chat_format, tries, bos_token=bos_token, eos_token=eos_token, adds_bos=adds_bos
        ):
            return template
    raise FormatError(
        f"the format {chat_format.name!r} cannot be written as a tokenizer's chat template.",
        remedy="serve it by its name: chaccu renders it itself",
    )


def _write_head(chat_format: ChatFormat, bos_token: str, eos_token: str) -> list[str]:
    """What gives the format's template the variables that it reads."""
    names = [("bos_token", bos_token, chat_format.bos_token), ("eos_token", eos_token, chat_format.eos_token)]
    return [
        *(f"{{% set {name} = {_quote(own)} %}}" for name, known, own in names if own and not known),
        '{% if messages and messages[0]["role"] == "system" %}',
        '{% set system = messages[0]["content"] %}',
        "{% set messages = messages[1:] %}",
        "{% else %}",
        f"{{% set system = {_quote(chat_format.default_system)} %}}",
        "{% endif %}",
        "{% if add_generation_prompt %}",
        '{% set messages = messages + [{"role": "assistant", "content": ""}] %}',
        "{% endif %}",
    ]


def writes_same(
    template: str,
    chat_format: ChatFormat,
    probes: Iterable[Conversation],
    *,
    bos_token: str = "",
    eos_token: str = "",
    adds_bos: bool = False,
) -> bool:
    """Whether a tokenizer's `template` writes the text of `chat_format` for each of the `probes` that the format takes: the
    conversation and, where its last message is a reply, what awaits this."""
    published = TokenizerFormat(name=chat_format.name, template=template)
    try:
        return all(_same(published, chat_format, probe, bos_token, eos_token, adds_bos) for probe in probes)
    except FormatError:
        return False


def _same(
    published: TokenizerFormat, chat_format: ChatFormat, probe: Conversation, bos_token: str, eos_token: str, adds_bos: bool
) -> bool:
    for pending in (False, True):
        if not pending and probe.is_pending:
            continue
        try:
            written = chat_format.render(probe, pending=pending, bos_token=bos_token or None, eos_token=eos_token or None)
        except FormatError:
            continue  # what the format refuses to write, nobody has to write like it
        found = published.write_text(probe, pending=pending, bos_token=bos_token, eos_token=eos_token)
        # The tokenizer puts its BOS token first unless the format has written it.
        begun = bool(written.segments) and not written.segments[0].content and written.text.startswith(bos_token)
        if found != (bos_token if adds_bos and not begun else "") + written.text:
            return False
    return True


def _close(match: re.Match[str]) -> str:
    """Whitespace goes where the tags took it: a newline behind a tag, and all of it before a tag with a dash."""
    trims, rest, opening, other = match.groups()
    rest = rest.lstrip() if trims else rest.removeprefix("\n")
    return f"{rest}{opening} endif %}}{opening}{other}"


def _quote(text: str) -> str:
    """A text as Jinja spells it."""
    return json.dumps(text, ensure_ascii=False)
