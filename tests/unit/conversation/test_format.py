from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chaccu.conversation import Conversation, Message, list_formats, load_format
from chaccu.conversation.format import parse_format
from chaccu.errors import FormatError, UsageError

PROMPTS = Path(__file__).parents[4] / "shared" / "data" / "formats" / "prompts.json"
# What the published text of a format does to messages; the others leave them as they are.
CHANGES: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(("llama-3.1", "llama-3.2", "llama-3.3", "command-r"), str.strip),
    "falcon": lambda text: text.replace("\r\n", "\n").replace("\n\n", "\n"),
}
HEAD = "---\ndescription: x\n---\n"
REPLY = "{% generation %}{{ message.content }}{% endgeneration %}"
EACH = "{% for message in messages %}" + REPLY + "{% endfor %}"


def published_cases() -> list[dict[str, Any]]:
    """The published prompts: 20 formats, four conversations each; none where the file is not there."""
    return list(json.loads(PROMPTS.read_text(encoding="utf-8"))) if PROMPTS.is_file() else []


@pytest.mark.skipif(not PROMPTS.is_file(), reason="the published prompts are not there")
def test_the_published_formats_are_all_there() -> None:
    cases = published_cases()
    assert len(cases) == 80
    names = {case["template"] for case in cases}
    assert len(names) == 20
    # one_shot is zero_shot behind an example exchange, whose text is not ours to ship.
    assert names - {"one_shot"} <= set(list_formats())


@pytest.mark.parametrize("case", published_cases(), ids=lambda case: f"{case['template']}-{case['case']}")
def test_a_published_prompt_byte_for_byte(case: dict[str, Any]) -> None:
    chat_format = load_format("zero_shot" if case["template"] == "one_shot" else case["template"])
    turns = tuple(Message(one["role"], one["content"]) for one in case["messages"])
    if case["template"] == "one_shot":
        turns = (*example_round(case), *turns)
    rendering = chat_format.render(Conversation(messages=turns, system=case["system"]))
    assert rendering.text == case["prompt"]
    assert chat_format.default_system == case["default_system"]
    assert list(chat_format.stop_token_ids) == (case["stop_token_ids"] or [])
    # Where none is published, the end of a turn is what stops.
    assert case["stop_str"] is None or case["stop_str"] in chat_format.stop


def example_round(case: dict[str, Any]) -> tuple[Message, Message]:
    """The exchange that a one_shot prompt begins with."""
    _, example, _ = case["prompt"].split("### Human: ", 2)
    question, answer = example.split("\n### Assistant: ")
    return Message("user", question), Message("assistant", answer.removesuffix("\n"))


# Each as its model's makers write it, from their own documentation: (system, first answer or None) and the text.
WRITTEN = {
    "vicuna_v0": "S\n### Human: Q\n### Assistant: A\n### Human: R\n### Assistant:",
    "llama-3.1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nR<|end|>\n<|assistant|>\n",
    "phi-4": (
        "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>A<|im_end|>"
        "<|im_start|>user<|im_sep|>R<|im_end|><|im_start|>assistant<|im_sep|>"
    ),
    "command-r": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q"
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|USER_TOKEN|>R<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "orca-2": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant"
    ),
    "internlm2": (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    ),
    "stablelm-alpha": "<|SYSTEM|>S<|USER|>Q<|ASSISTANT|>A<|USER|>R<|ASSISTANT|>",
    "stablelm-zephyr": (
        "<|system|>\nS<|endoftext|>\n<|user|>\nQ<|endoftext|>\n<|assistant|>\nA<|endoftext|>\n<|user|>\nR<|endoftext|>\n"
        "<|assistant|>\n"
    ),
    "starchat": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nR<|end|>\n<|assistant|>\n",
    "tulu-2": "<|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA</s>\n<|user|>\nR\n<|assistant|>\n",
    "oasst_llama": "S<|prompter|>Q</s><|assistant|>A</s><|prompter|>R</s><|assistant|>",
    "gemma-3": (
        "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nR<end_of_turn>\n"
        "<start_of_turn>model\n"
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_documented_prompt(name: str) -> None:
    turns = (Message("user", "Q"), Message("assistant", "A"), Message("user", "R"))
    assert load_format(name).render(Conversation(messages=turns, system="S")).text == WRITTEN[name]


@pytest.mark.parametrize("name", list_formats())
def test_every_shipped_format_has_a_head_and_ends_its_turns(name: str) -> None:
    chat_format = load_format(name)
    assert chat_format.name == name
    assert chat_format.description.strip()
    turns = (Message("user", "Q"), Message("assistant", "A"), Message("user", "R"))
    reply = [one for one in chat_format.render(Conversation(messages=turns), pending=False).segments if one.reply == 0]
    written = "".join(segment.text for segment in reply)
    assert written.strip().startswith("A")
    if name == "raw":
        return  # it says itself that it ends no turn
    stops = chat_format.stop or (chat_format.eos_token,)
    assert any(stop and written.endswith(stop) for stop in stops)


def test_a_default_system_text_may_hold_control_tokens_and_a_given_one_may_not() -> None:
    chat_format = load_format("deepseek-chat")
    asked = Conversation(messages=(Message("user", "Q"),))
    assert chat_format.render(asked).segments[0].content is False
    given = msgspec.structs.replace(asked, system=chat_format.default_system)
    assert chat_format.render(given).segments[0].content is True
    assert chat_format.render(given).text == chat_format.render(asked).text


@pytest.mark.parametrize("name", list_formats())
@settings(max_examples=25, deadline=None)
@given(text=st.text(max_size=30))
@example(text="\x00")
@example(text="\x000\x00\x01")
def test_every_character_of_a_message_comes_through(name: str, text: str) -> None:
    conversation = Conversation(messages=(Message("user", text), Message("assistant", text)))
    content = [segment.text for segment in load_format(name).render(conversation).segments if segment.content]
    kept = CHANGES.get(name, str)(text)
    assert [one for one in content if one == kept] == [kept, kept][: 2 if kept else 0]


@pytest.mark.parametrize("name", list_formats())
def test_an_awaited_reply_ends_the_text_where_it_would_begin(name: str) -> None:
    chat_format = load_format(name)
    asked = Conversation(messages=(Message("user", "Q"),))
    awaited = Conversation(messages=(Message("user", "Q"), Message("assistant", None)))
    whole = Conversation(messages=(Message("user", "Q"), Message("assistant", "A")))
    prompt = chat_format.render(asked).text
    assert chat_format.render(awaited).text == prompt
    assert chat_format.render(whole, pending=True).text == prompt
    assert chat_format.render(whole).text.startswith(prompt)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'vicuna_v"):
        load_format("vicuna_v1")
    with pytest.raises(UsageError):
        load_format("../formats/chatml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (EACH, "has no head"),
        (HEAD + "{{ messages }}", "marks no generated text"),
        (HEAD + "{% for %}" + REPLY, "is malformed"),
        (HEAD + "{% generation %}{{ x }}", "is malformed"),
        ("---\nstop: [\n---\n" + EACH, "is malformed"),
        ("---\nstop: 5\n---\n" + EACH, "is malformed"),
        ("---\nlike: chatml\n---\n" + EACH, "has a template too"),
        ("---\nlike: chatm\n---\n", "did you mean 'chatml'"),
        ("---\nlike: mine\n---\n", "which is no other format"),
        (HEAD + "{{ messages[0].content | wordwrap }}" + EACH, "No filter named 'wordwrap'"),
        ("---\njust text\n---\n" + EACH, "is malformed"),
    ],
)
def test_a_bad_format_file_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        parse_format(text, name="mine")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{{ raise_exception('no tools here') }}" + EACH, "no tools here"),
        ("{{ unknown_name }}" + EACH, "unknown_name"),
        ("{{ messages.__class__.__mro__ }}" + EACH, "cannot render"),
    ],
)
def test_a_template_that_refuses_is_a_format_error(body: str, says: str) -> None:
    chat_format = parse_format(HEAD + body, name="mine")
    with pytest.raises(FormatError, match=says):
        chat_format.render(Conversation(messages=(Message("user", "Q"),)))


def test_string_methods_keep_a_content_a_content() -> None:
    body = "{% for message in messages %}{% generation %}{{ message.content.strip() }}|{% endgeneration %}{% endfor %}"
    chat_format = parse_format(HEAD + body, name="mine")
    rendering = chat_format.render(Conversation(messages=(Message("assistant", "  A \n"),)))
    assert [(one.text, one.content) for one in rendering.segments] == [("A", True), ("|", False)]


def test_a_content_joined_to_text_stays_a_content() -> None:
    reply = "{{ '<' + message.content ~ '>' }}{% generation %}{{ message.content[1:] }}{% endgeneration %}"
    body = "{% for message in messages %}" + reply
    rendering = parse_format(HEAD + body + "{% endfor %}", name="mine").render(
        Conversation(messages=(Message("assistant", "abc"),))
    )
    assert [(one.text, one.content) for one in rendering.segments] == [("<", False), ("abc", True), (">", False), ("bc", True)]


def test_a_format_like_another_has_its_own_head() -> None:
    chat_format = parse_format("---\nlike: chatml\ndescription: mine\ndefault_system: D\n---\n", name="mine")
    assert (chat_format.name, chat_format.description, chat_format.stop) == ("mine", "mine", ("<|im_end|>",))
    assert chat_format.render(Conversation(messages=(Message("user", "Q"),))).text.startswith("<|im_start|>system\nD<|im_end|>")
