"""Chat formats as templates of tokenizers: what is exported writes what the format writes."""

from __future__ import annotations

import pytest

from chaccu.conversation import Conversation, Message, list_formats, load_format, load_template_format
from chaccu.conversation.template_export import export_template
from chaccu.errors import FormatError

# Their answers end with the next turn's header, or with nothing.
WITHOUT_END = {"chatglm3", "raw", "stablelm-alpha"}
TALK = Conversation(
    messages=(
        *(Message("user", "  {{ bos_token }} <|im_end|>\n"), Message("assistant", "First.\n\nAnd\tthen.")),
        *(Message("user", "2"), Message("assistant", "Two.")),
    ),
    system='Answer "briefly".\nIn two lines \\ or three.',
)


@pytest.mark.parametrize("name", list_formats())
def test_what_is_exported_writes_what_the_format_writes(name: str) -> None:
    chat_format = load_format(name)
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    if name in WITHOUT_END:
        with pytest.raises(FormatError, match=f"{name}.*cannot be written as a tokenizer's chat template"):
            export_template(chat_format, **ends, adds_bos=True)
        return
    for adds_bos in (False, True):
        exported = load_template_format(export_template(chat_format, **ends, adds_bos=adds_bos), **ends)
        for talk in (TALK, TALK.pending_at(3), TALK.pending_at(1)):
            wanted = chat_format.render(talk, bos_token="<s>", eos_token="</s>").text
            before = "<s>" if adds_bos and not wanted.startswith("<s>") else ""
            assert exported.render(talk, bos_token="<s>", eos_token="</s>").text == before + wanted
