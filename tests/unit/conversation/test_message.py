from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from chaccu.conversation import Conversation, Message, conversation_from_openai, parse_conversation
from chaccu.errors import ConversationError


def test_json_is_read_with_pending_and_system() -> None:
    data = '{"system": null, "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": null}]}'
    conversation = parse_conversation(data)
    assert conversation == Conversation(messages=(Message("user", "Q"), Message("assistant", None)))
    assert conversation.is_pending
    assert parse_conversation(msgspec.json.encode(conversation)) == conversation


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "is not a conversation"),
        ("[]", "is not a conversation"),
        ('{"messages": 1}', "is not a conversation"),
        ('{"messages": []}', "has no messages"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "Invalid enum value 'robot'"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "Invalid enum value 'system'"),
        ('{"messages": [{"role": "user"}]}', "missing required field `content`"),
        ('{"messages": [{"role": "user", "content": 5}]}', r"messages\[0\].content"),
        ('{"messages": [{"role": "user", "content": null}]}', r"message 0 \(user\) has content null"),
        (
            '{"messages": [{"role": "assistant", "content": null}, {"role": "user", "content": "x"}]}',
            r"message 0 \(assistant\) has content null",
        ),
        (
            '{"messages": [{"role": "user", "content": "x", "unfinished": true}]}',
            r"message 0 \(user\) is marked as a window of an answer",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x", "unfinished": true}, {"role": "user", "content": "y"}]}',
            r"message 0 \(assistant\) is marked as a window of an answer",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "four", "trained_from": 4}]}',
            "message 0 is trained from character 4 of 4",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_with_the_reason(data: str, says: str) -> None:
    with pytest.raises(ConversationError, match=says) as caught:
        parse_conversation(data)
    assert caught.value.remedy
    with pytest.raises(ConversationError):
        parse_conversation(data.encode())


def test_bytes_that_are_no_utf8_are_refused() -> None:
    with pytest.raises(ConversationError, match="is not a conversation"):
        parse_conversation(b'{"messages": [{"role": "user", "content": "\xff"}]}')


def test_openai_messages_join_their_system_texts() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "One."},
        {"role": "developer", "content": [{"type": "text", "text": "Tw"}, {"type": "text", "text": "o."}]},
        {"role": "user", "content": "Q"},
    ]
    assert conversation_from_openai(messages) == Conversation(messages=(Message("user", "Q"),), system="One.\n\nTwo.")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "has no messages"),
        ([{"role": "system", "content": "x"}], "has no messages"),
        ([{"role": "robot", "content": "x"}], "message 0 has the role 'robot'"),
        ([{"content": "x"}], "message 0 has the role None"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "content of message 1 is not text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "content of message 0 is not text"),
        ([{"role": "user", "content": ["x"]}], "content of message 0 is not text"),
    ],
)
def test_openai_messages_of_another_form_are_refused(messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ConversationError, match=says):
        conversation_from_openai(messages)


def test_a_conversation_can_be_taken_back_to_an_awaited_reply() -> None:
    turns = (Message("user", "1"), Message("assistant", "2"), Message("user", "3"), Message("assistant", "4"))
    conversation = Conversation(messages=turns, system="S", id="a")
    back = conversation.pending_at(1)
    assert back.messages == (Message("user", "1"), Message("assistant", None))
    assert (back.system, back.id, back.is_pending, conversation.is_pending) == ("S", "a", True, False)
    assert json.loads(msgspec.json.encode(back))["messages"][-1]["content"] is None
