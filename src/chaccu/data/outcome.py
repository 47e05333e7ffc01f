"""What a step says of a conversation, and what kinds of step there are.

A step returns the conversation itself (nothing to say), `Changed` (kept, with a ledger row a reason) or `Drop`. Steps carry
no state; what must remember earlier conversations is an `Index`, kept by whoever runs the steps, which sees digests in
input order. So steps may run anywhere and in parallel, and the result is that of one process going through the input once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import msgspec

from chaccu.conversation import Conversation
from chaccu.data.records import Draft
from chaccu.data.rounds import Round, join_rounds, split_rounds


class Drop(msgspec.Struct, frozen=True):
    """The conversation is not kept."""

    reason: str


class Changed(msgspec.Struct, frozen=True):
    """The conversation is kept, changed, for these reasons; several `conversations` when it was split. A step that has counted
    tokens says how many each of them has (and may do so without a reason, for one that it leaves as it is)."""

    conversations: tuple[Conversation, ...]
    reasons: tuple[str, ...]
    tokens: tuple[int, ...] = ()


Outcome = Conversation | Changed | Drop


class Trimmed(msgspec.Struct, frozen=True):
    """The draft goes on without what an earlier part of its conversation holds already."""

    draft: Draft
    reason: str


class Joined(msgspec.Struct, frozen=True):
    """The draft's new turns, of `new_chars` characters, went to the draft at index `leader` and share its fate."""

    reason: str
    new_chars: int
    leader: int


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every step: a record of its settings. A subclass sets `name`, the key in the configuration."""

    name: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the step: its settings, and the hashes of files that they name."""
        settings: dict[str, Any] = msgspec.to_builtins(self)
        return settings


@runtime_checkable
class RecordStep(Protocol):
    """A step that judges a decoded record by what stands beside its turns, once its reader has made a draft of it."""

    def judge_record(self, value: Any) -> Drop | None: ...


@runtime_checkable
class PartsStep(Protocol):
    """The step that sees drafts as they stand one after another in the dump; it answers for each, in order."""

    def join_parts(self, drafts: Sequence[Draft]) -> list[Draft | Trimmed | Joined | Drop]: ...


@runtime_checkable
class DraftStep(Protocol):
    """The step that makes a conversation of what a reader found."""

    def order_turns(self, draft: Draft) -> Outcome: ...


@runtime_checkable
class ConversationStep(Protocol):
    """A step that judges one conversation by itself."""

    def __call__(self, conversation: Conversation) -> Outcome: ...


class Index(Protocol):
    """The memory of a corpus step."""

    def admit(self, digest: Any) -> str | None:
        """Remember `digest` and return None, or return why its conversation is to be dropped."""
        ...


@runtime_checkable
class CorpusStep(Protocol):
    """A step that judges a conversation by those before it: by a digest made anywhere, shown to one index in input order."""

    def digest(self, conversation: Conversation) -> Any: ...

    def open_index(self) -> Index: ...


def filter_rounds(conversation: Conversation, judge: Callable[[Round], str | None]) -> Outcome:
    """Keep the rounds of which `judge` says None; the others' reasons are changes, or the drop's reason when no round is
    left."""
    rounds = split_rounds(conversation.messages)
    verdicts = [judge(turns) for turns in rounds]
    reasons = [reason for reason in verdicts if reason is not None]
    if not reasons:
        return conversation
    kept = [turns for turns, reason in zip(rounds, verdicts, strict=True) if reason is None]
    if not kept:
        return Drop(reasons[0])
    return Changed((join_rounds(conversation, kept),), tuple(reasons))
