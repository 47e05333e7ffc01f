from __future__ import annotations

from pathlib import Path

import pytest

from chaccu.data.identity import load_identity, write_identity
from chaccu.data.records import read_conversations
from chaccu.errors import UsageError

NAME = "Vicky the vicuña"


def test_every_answer_about_it_holds_the_name_and_no_other_does() -> None:
    identity = load_identity(NAME, "the herders")
    assert 36 <= len(identity.training) <= 48
    assert all(NAME in (conversation.messages[1].content or "") for conversation in identity.training)
    assert len(identity.others) == 24
    assert all("Vicky" not in str(conversation) for conversation in identity.others)
    assert all("{" not in (message.content or "") for c in identity.training for message in c.messages)
    assert any("the herders" in (conversation.messages[1].content or "") for conversation in identity.training)


def test_held_out_wordings_are_never_trained() -> None:
    identity = load_identity(NAME)
    trained = {(conversation.messages[0].content or "").casefold().strip("?!. ") for conversation in identity.training}
    assert len(identity.held_out) == 10
    assert not trained & {question.casefold().strip("?!. ") for question in identity.held_out}


def test_file_reads_back_and_is_the_same_each_time(tmp_path: Path) -> None:
    identity = write_identity(tmp_path / "a.jsonl", NAME)
    write_identity(tmp_path / "b.jsonl", NAME)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert tuple(read_conversations(tmp_path / "a.jsonl")) == (*identity.training, *identity.others)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(UsageError, match="name is empty"):
        load_identity("  ")
