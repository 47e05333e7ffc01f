"""Chat formats as templates of tokenizers: what is exported writes what the format writes."""

from __future__ import annotations

import msgspec
import pytest

from chaccu.conversation import Conversation, Message, list_formats, load_format
from chaccu.conversation.template_export import export_template
from chaccu.conversation.template_format import TokenizerFormat
from chaccu.errors import FormatError

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
    for adds_bos in (False, True):
        exported = TokenizerFormat(name=name, template=export_template(chat_format, **ends, adds_bos=adds_bos))
        for talk, pending in ((TALK, False), (TALK.pending_at(3), True), (TALK.pending_at(1), True)):
            wanted = chat_format.render(talk, bos_token="<s>", eos_token="</s>").text
            before = "<s>" if adds_bos and not wanted.startswith("<s>") else ""
            assert exported.write_text(talk, pending=pending, bos_token="<s>", eos_token="</s>") == before + wanted


def test_a_format_that_looks_at_no_loop_is_refused() -> None:
    body = "{% generation %}{{ one.content }}{% endgeneration %}"
    odd = msgspec.structs.replace(load_format("chatml"), template=f"{{% for one in messages %}}{body}{{% endfor %}}")
    with pytest.raises(FormatError, match="'chatml' cannot be written as a tokenizer's chat template"):
        export_template(odd, bos_token="", eos_token="", adds_bos=False)
