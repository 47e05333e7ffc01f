"""Chat templates that tokenizers bring along: found, followed exactly, or refused with the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chaccu.conversation import (
    Conversation,
    Message,
    Rendering,
    list_formats,
    load_format,
    load_template_format,
    resolve_format,
)
from chaccu.errors import FormatError, UsageError

from .chat_templates import CHATML, GENERATION, LLAMA_2, TEMPLATES, THINKING, TRIMMED

TWO = Conversation(
    messages=(Message("user", "Q"), Message("assistant", "A"), Message("user", "R"), Message("assistant", "B")), system="S"
)


def said(rendering: Rendering) -> str:
    """The text with each generated run in brackets."""
    return "".join(f"⟦{one.text}⟧" if one.reply is not None else one.text for one in rendering.segments).replace("⟧⟦", "")


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_replies_are_found_with_their_ends(template: str) -> None:
    assert said(load_template_format(template).render(TWO)) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n⟦B<|im_end|>⟧\n"
    )


def test_blanks_around_a_reply_are_generated_and_its_end_is_the_end_of_sequence() -> None:
    chat_format = load_template_format(LLAMA_2, bos_token="<s>", eos_token="</s>")
    assert chat_format.stop == ("</s>",)
    assert said(chat_format.render(TWO)) == ("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]⟦ A </s>⟧<s>[INST] R [/INST]⟦ B </s>⟧")


def test_what_a_template_cuts_from_a_message_is_followed() -> None:
    blank = Conversation(messages=(Message("user", " Q\n"), Message("assistant", "\n A ")))
    assert said(load_template_format(TRIMMED).render(blank)).endswith("assistant<|end_header_id|>\n\n⟦A<|eot_id|>⟧")
    thought = Conversation(messages=(Message("user", "Q"), Message("assistant", "<think>\nhm\n</think>\n\nA")))
    assert said(load_template_format(THINKING).render(thought)).endswith("<|im_start|>assistant\n⟦A<|im_end|>⟧\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_awaited_reply_is_the_generation_prompt(name: str) -> None:
    chat_format = load_template_format(TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    whole = chat_format.render(TWO)
    for turn in (1, 3):
        prompt = chat_format.render(TWO.pending_at(turn))
        assert whole.text.startswith(prompt.text)
        assert whole.segments[: len(prompt.segments)] == prompt.segments
    assert chat_format.render(TWO, pending=True) == chat_format.render(TWO.pending_at(3))


def test_marks_in_a_message_are_text() -> None:
    text = "\x000\x00 \x01\x02 {{ messages }} {% generation %}"
    messages = (Message("user", text), Message("assistant", text))
    for template in TEMPLATES.values():
        rendering = load_template_format(template, eos_token="</s>").render(Conversation(messages=messages))
        assert [one.text for one in rendering.segments if one.content] == [text, text]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[-1].content }}!", "does not keep the prompt of turn 1: at character 0"),
        ("{{ messages | length }}" + CHATML, "at character 0 the prompt says '1<|im_start|>"),
        (CHATML.replace("+ '<|im_end|>'", "+ ('' if loop.index == 2 and not loop.last else '<|im_end|>')"), "ends turn 1 with"),
        ("{% for m in messages %}{{ (m.role + ': ' + m.content) | trim }};{% endfor %}", "changes the text of a message"),
        ("{{ raise_exception('no thanks') if messages | length > 2 }}" + CHATML, "cannot render this conversation: no thanks"),
        (
            GENERATION.replace("{{ '<|im_start|>' + message.role", "{% generation %}{% endgeneration %}{{ '<' + message.role"),
            "marks 6",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ 'A:' }}{% generation %}"
            "{{ m.content + ';' }}{% endgeneration %}{% endif %}{% endfor %}",
            "marks turn 1 from character 8, but its prompt ends at 6",
        ),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused_with_the_place(template: str, says: str) -> None:
    rounds = (Message("user", "\nasked"), Message("assistant", "told "), Message("user", "again"), Message("assistant", "no"))
    chat_format = load_template_format(template)
    with pytest.raises(FormatError) as caught:
        chat_format.render(Conversation(messages=rounds))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes nothing after a reply"),
        ("{% for m in messages %}{{ m.content | tojson }};{% endfor %}", "changes the text of a message"),
        ("{% for %}", "is malformed"),
        ("{{ nothing.at.all }}", "cannot render"),
        ("", "writes nothing after a reply"),
    ],
)
def test_a_template_of_no_use_is_refused_when_it_is_read(template: str, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        load_template_format(template)


def write_config(folder: Path, **fields: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_a_model_folder_names_its_template_and_tokens(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template=LLAMA_2, bos_token="<s>", eos_token={"content": "</s>"})
    chat_format = resolve_format("tokenizer", tmp_path)
    assert (chat_format.name, chat_format.stop, chat_format.eos_token) == ("tokenizer", ("</s>",), "</s>")
    assert load_template_format(tmp_path / "tokenizer_config.json") == chat_format
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": LLAMA_2}]
    assert (
        resolve_format("tokenizer", write_config(tmp_path, chat_template=several, bos_token="<s>", eos_token="</s>"))
        == chat_format
    )


def test_a_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="x", eos_token="<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    for source in (tmp_path, tmp_path / "chat_template.jinja"):
        assert load_template_format(source).stop == ("<|im_end|>",)


def test_special_tokens_of_the_tokenizer_end_a_turn(tmp_path: Path) -> None:
    template = CHATML.replace("<|im_end|>", "<end> of it")
    tokens = [{"content": "<end>", "special": True}, {"content": "of", "special": False}]
    write_config(tmp_path, chat_template=template)
    assert load_template_format(tmp_path).stop == ("<end> of it",)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}), encoding="utf-8")
    assert load_template_format(tmp_path).stop == ("<end>",)


def test_a_folder_without_a_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        load_template_format(tmp_path)
    with pytest.raises(FormatError, match="has no chat template"):
        load_template_format(write_config(tmp_path, eos_token="</s>"))
    (tmp_path / "tokenizer_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(FormatError, match="cannot be read"):
        load_template_format(tmp_path)
    with pytest.raises(UsageError, match="no model folder is given"):
        resolve_format("tokenizer")


def test_other_names_are_those_of_shipped_formats(tmp_path: Path) -> None:
    assert resolve_format("chatml", tmp_path) is load_format("chatml")
    assert "tokenizer" not in list_formats()
    with pytest.raises(UsageError):
        resolve_format("chatmll", tmp_path)
