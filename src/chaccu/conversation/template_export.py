"""A chat format as the chat template of a tokenizer: what transformers and its like render with `apply_chat_template`.

Such a template gets the system text as a first message and has no tag that ends a prompt where a reply begins. So the
format's own template fills a variable, in which a mark stands where each reply begins, and what is written is all of it or
what comes before the last mark. Invariant: what is returned has been rendered beside the format and has written the same
text, or it is refused.
"""

from __future__ import annotations

import re

from chaccu.conversation.format import ChatFormat
from chaccu.conversation.message import Conversation, Message
from chaccu.conversation.template_format import load_template_format
from chaccu.errors import FormatError

_BEGIN = re.compile(r"\{%(-?)\s*generation\s*(-?)%\}")
_END = re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}")
# No message is likely to hold it, and no tokenizer knows it.
_MARK = r"\u0001"
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


def export_template(chat_format: ChatFormat, *, bos_token: str, eos_token: str, adds_bos: bool) -> str:
    """The Jinja text. `bos_token` and `eos_token` are the tokenizer's; `adds_bos`: whether it begins every text with the first.

    Raises `FormatError` when a template of a tokenizer cannot write what the format writes.
    """

    def write(one: ChatFormat, conversation: Conversation) -> str:
        return one.render(conversation, bos_token=bos_token, eos_token=eos_token).text

    begins_with_bos = bool(bos_token) and write(chat_format, _PROBES[0]).startswith(bos_token)
    before = bos_token if adds_bos and not begins_with_bos else ""
    text = _wrap(chat_format, "{{ bos_token }}" if before else "")
    for conversation in _PROBES:
        wanted = write(chat_format, conversation)
        try:
            found = write(load_template_format(text, bos_token=bos_token, eos_token=eos_token), conversation)
        except FormatError as error:
            raise FormatError(
                f"the format {chat_format.name!r} cannot be written as a tokenizer's chat template: {error.message}",
                remedy="serve it by its name: chaccu renders it itself",
            ) from error
        if found != before + wanted:
            raise FormatError(
                f"the format {chat_format.name!r} cannot be written as a tokenizer's chat template: {found!r} would stand for "
                f"{before + wanted!r}.",
                remedy="serve it by its name: chaccu renders it itself",
            )
    return text


def _wrap(chat_format: ChatFormat, before: str) -> str:
    begin = f'{{{{ "{_MARK}" }}}}'
    body = _BEGIN.sub(lambda tag: f"{{%{tag[1]} if true %}}{begin}{{% if true {tag[2]}%}}", chat_format.template)
    body = _END.sub(r"{%\1 endif %}{% endif \2%}", body)
    return (
        "{%- set has_system = messages and messages[0].role == 'system' %}\n"
        f"{{%- set system = messages[0].content if has_system else {_quote(chat_format.default_system)} %}}\n"
        "{%- set messages = messages[1:] if has_system else messages %}\n"
        "{%- if add_generation_prompt %}{% set messages = messages + [{'role': 'assistant', 'content': ''}] %}{% endif %}\n"
        f"{{%- set written %}}{body}{{% endset %}}\n"
        f"{before and '{{- bos_token }}'}"
        f'{{{{- (written.rpartition("{_MARK}")[0] if add_generation_prompt else written).replace("{_MARK}", "") }}}}'
    )


def _quote(text: str) -> str:
    """A string of Jinja."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
