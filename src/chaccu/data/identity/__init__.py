"""Identity: a small set of conversations that teach a model its name, with plain ones beside them that teach it not to
overdo it.

Invariants: every wording in `held_out` is absent from training; the plain pairs never hold the name; equal arguments give
equal bytes.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec
import yaml

from chaccu.artifact import atomic_file
from chaccu.conversation import Conversation, Message
from chaccu.errors import UsageError

SOURCE = "identity"


class _Group(msgspec.Struct, frozen=True):
    about: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


class _Pair(msgspec.Struct, frozen=True):
    question: str
    answer: str


class _Template(msgspec.Struct, frozen=True):
    groups: tuple[_Group, ...]
    others: tuple[_Pair, ...]
    held_out: tuple[str, ...] = msgspec.field(name="HELD_OUT")


class IdentitySet(msgspec.Struct, frozen=True):
    """`training`: conversations about the identity; `others`: plain ones without the name; `held_out`: questions for
    evaluation only, wordings of "who are you" to each of which a model that knows itself answers with its name."""

    training: tuple[Conversation, ...]
    others: tuple[Conversation, ...]
    held_out: tuple[str, ...]


def load_identity(name: str, maker: str = "") -> IdentitySet:
    """The set for a model called `name`, made by `maker`.

    Raises `UsageError` when the name is blank.
    """
    name, maker = name.strip(), maker.strip() or "the people who trained me"
    if not name:
        raise UsageError("the name is empty.", remedy="give one, such as --name 'Vicky the vicuña'")
    text = (resources.files("chaccu.data.identity") / "en.yaml").read_text(encoding="utf-8")
    template = msgspec.convert(yaml.safe_load(text), _Template)
    training = [
        _pair(f"{group.about}-{number}", question, _fill(group.answers[(number - 1) % len(group.answers)], name, maker))
        for group in template.groups
        for number, question in enumerate(group.questions, start=1)
    ]
    others = [_pair(f"other-{number}", pair.question, pair.answer) for number, pair in enumerate(template.others, start=1)]
    return IdentitySet(tuple(training), tuple(others), template.held_out)


def write_identity(out: Path, name: str, maker: str = "") -> IdentitySet:
    """Write the training and the plain conversations as JSONL, atomically; returns the set.

    Raises `UsageError` for a blank name, `StorageError` when the file cannot be written.
    """
    identity = load_identity(name, maker)
    with atomic_file(out) as file:
        for conversation in (*identity.training, *identity.others):
            file.write(msgspec.json.encode(conversation) + b"\n")
    return identity


def _fill(answer: str, name: str, maker: str) -> str:
    filled = answer.replace("{maker}", maker).replace("{name}", name)
    return filled[:1].upper() + filled[1:]


def _pair(pair_id: str, question: str, answer: str) -> Conversation:
    messages = (Message("user", question), Message("assistant", answer))
    return Conversation(messages=messages, id=pair_id, source=f"{SOURCE}#{pair_id}")
