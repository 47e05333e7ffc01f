from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaccu.conversation import Conversation, Message, list_formats, load_format
from chaccu.conversation.format import parse_format
from chaccu.errors import FormatError, UsageError

PROMPTS = Path(__file__).parents[4] / "shared" / "data" / "formats" / "prompts.json"
HEAD = "---\ndescription: x\n---\n"
REPLY = "{% generation %}{{ message.content }}{% endgeneration %}"
EACH = "{% for message in messages %}" + REPLY + "{% endfor %}"


def test_shipped_prompts_are_byte_for_byte_the_published_ones() -> None:
    if not PROMPTS.is_file():
        pytest.skip(f"the published prompts are not there: {PROMPTS}")
    cases = [case for case in json.loads(PROMPTS.read_text()) if case["template"] in list_formats()]
    assert {case["template"] for case in cases} >= {"vicuna_v1.1", "llama-3", "zephyr"}
    for case in cases:
        conversation = Conversation(
            messages=tuple(Message(one["role"], one["content"]) for one in case["messages"]), system=case["system"]
        )
        rendered = load_format(case["template"]).render(conversation).text
        assert rendered == case["prompt"], (case["template"], case["case"])


@pytest.mark.parametrize("name", list_formats())
def test_every_shipped_format_has_a_head_and_ends_its_turns(name: str) -> None:
    chat_format = load_format(name)
    assert chat_format.name == name
    assert chat_format.description
    conversation = Conversation(messages=(Message("user", "Q"), Message("assistant", "A")))
    reply = [segment for segment in chat_format.render(conversation).segments if segment.reply == 0]
    written = "".join(segment.text for segment in reply)
    assert written.strip().startswith("A")
    end = chat_format.stop[0] if chat_format.stop else chat_format.eos_token
    assert end
    assert written.endswith(end)


@pytest.mark.parametrize("name", list_formats())
@given(text=st.text(max_size=30))
def test_every_character_of_a_message_comes_through(name: str, text: str) -> None:
    conversation = Conversation(messages=(Message("user", text), Message("assistant", text)))
    content = [segment.text for segment in load_format(name).render(conversation).segments if segment.content]
    assert [one for one in content if one == text] == [text, text][: 2 if text else 0]


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
    with pytest.raises(UsageError, match=r"did you mean 'vicuna_v1\.1'"):
        load_format("vicuna")
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
        ("{{ 'a' + messages[0].content }}" + EACH, "may not be joined"),
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
