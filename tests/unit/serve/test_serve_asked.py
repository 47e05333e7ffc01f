"""What every dialect makes of its own form of one and the same request."""

from __future__ import annotations

from typing import Any

import pytest

from chaccu.conversation import Conversation, Message
from chaccu.serve.gateway.dialects.dialect import Dialect
from chaccu.serve.gateway.dialects.dialects import DIALECTS
from chaccu.serve.gateway.dialects.messages import MESSAGES
from chaccu.serve.gateway.dialects.openai_dialects import CHAT
from chaccu.serve.gateway.dialects.openai_responses import RESPONSES
from chaccu.serve.gateway.errors import ApiError

USER = {"role": "user", "content": "hi"}
FORMS: list[tuple[Dialect, dict[str, Any]]] = [
    (CHAT, {"messages": [{"role": "system", "content": "Be brief."}, USER], "max_tokens": 7, "user": "someone"}),
    (RESPONSES, {"instructions": "Be brief.", "input": "hi", "max_output_tokens": 7, "user": "someone"}),
    (MESSAGES, {"system": "Be brief.", "messages": [USER], "max_tokens": 7, "metadata": {"user_id": "someone"}}),
]


@pytest.mark.parametrize(("dialect", "fields"), FORMS, ids=lambda form: getattr(form, "path", ""))
def test_one_request_in_every_form(dialect: Dialect, fields: dict[str, Any]) -> None:
    asked = dialect.read({"model": "m", "temperature": 0.5, "top_p": 0.9, **fields})
    sampling = asked.job.sampling
    assert asked.job.conversation == Conversation(messages=(Message("user", "hi"),), system="Be brief.")
    assert (asked.job.model, asked.user, asked.streamed) == ("m", "someone", False)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.9)
    assert dialect.read({"model": "m", "stream": True, **fields}).streamed


@pytest.mark.parametrize(("dialect", "fields"), FORMS, ids=lambda form: getattr(form, "path", ""))
def test_a_number_without_a_fraction_is_a_whole_one(dialect: Dialect, fields: dict[str, Any]) -> None:
    limit = next(name for name in fields if name.startswith("max_"))
    assert dialect.read({"model": "m", **fields, limit: 7.0}).job.sampling.max_tokens == 7
    for wrong in (7.5, "7", True, float("inf")):
        with pytest.raises(ApiError, match=f"{limit} = "):
            dialect.read({"model": "m", **fields, limit: wrong})


def test_a_wrong_value_is_shown_wherever_it_stands() -> None:
    fields = {"model": "m", "max_tokens": 7, "messages": [USER, {"role": "user", "content": [{"type": "text", "text": 5}]}]}
    with pytest.raises(ApiError, match=r"^messages\[1\]\.content\[0\]\.text = 5: expected str, got int\.$"):
        MESSAGES.read(fields)
    with pytest.raises(ApiError, match=r"^metadata\[\.\.\.\] = {'a': 1}: expected str, got int\.$"):
        RESPONSES.read({"model": "m", "input": "hi", "metadata": {"a": 1}})


def test_no_system_block_is_no_system_text() -> None:
    fields = {"model": "m", "max_tokens": 7, "messages": [USER]}
    for system, text in (([], None), ("", ""), ([{"type": "text", "text": ""}], "")):
        conversation = MESSAGES.read({**fields, "system": system}).job.conversation
        assert conversation is not None
        assert conversation.system == text


def test_flags_of_other_servers_may_say_what_is_done_anyway() -> None:
    begun = [USER, {"role": "assistant", "content": "The "}]
    asked = CHAT.read({"model": "m", "messages": begun, "continue_final_message": True, "add_generation_prompt": False})
    assert asked.job.begun == "The "
    assert CHAT.read({"model": "m", "messages": [USER], "continue_final_message": False}).job.begun == ""
    for messages, flag in ((begun, {"continue_final_message": False}), ([USER], {"add_generation_prompt": False})):
        with pytest.raises(ApiError, match=f"{next(iter(flag))} = false is not supported"):
            CHAT.read({"model": "m", "messages": messages, **flag})


def test_paths_are_all_different() -> None:
    assert len({dialect.path for dialect in DIALECTS}) == len(DIALECTS)
