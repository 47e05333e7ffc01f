"""Roles and order: what a dump calls its speakers becomes user, assistant or tool; what is left is whole rounds.

Good rounds stay when bad turns beside them go. A round is good when one question is followed by an answer (with tool turns
between answers). Dropped, each with its reason: answers before the first question (parts of a longer conversation begin
so), turns of an unknown role or without text, system turns after the beginning, the second of two answers in a row, a last
question without an answer. Questions in a row are one question, since the model had all of them before it when it answered:
their texts are joined with a blank line between, those that are blank or said before left out. Texts are otherwise never
touched.
"""

from __future__ import annotations

from itertools import groupby
from typing import ClassVar, Literal, cast

import msgspec

from chaccu.conversation import Conversation, Message
from chaccu.data.outcome import Changed, Drop, Outcome, Step
from chaccu.data.records import Draft, Turn
from chaccu.data.rounds import Round
from chaccu.errors import RecipeError

_USER = frozenset({"user", "human", "prompter", "question"})
_ASSISTANT = frozenset({"assistant", "gpt", "chatgpt", "bard", "bing", "bot", "claude", "model", "ai", "answer"})
_SYSTEM = frozenset({"system", "developer"})
_TOOL = frozenset({"tool", "function", "observation"})

Known = Literal["user", "assistant", "tool", "system"]


class Roles(Step, frozen=True):
    """`names` adds a dump's own names, whatever their case: `{alice: user, hal: assistant}`. `questions_in_a_row`: `join` them
    to one, or keep only the `last`."""

    name: ClassVar[str] = "roles"

    names: dict[str, Known] = msgspec.field(default_factory=dict)
    questions_in_a_row: Literal["join", "last"] = "join"

    def __post_init__(self) -> None:
        names: dict[str, Known] = {}
        for name, role in self.names.items():
            if names.setdefault(_plain(name), role) != role:
                raise RecipeError(
                    f"roles: the name {name!r} is both {names[_plain(name)]} and {role}; case does not tell names apart.",
                    remedy="name it once",
                )
        msgspec.structs.force_setattr(self, "names", names)

    def order_turns(self, draft: Draft) -> Outcome:
        """A conversation of the draft's good rounds, `Changed` when turns were dropped, `Drop` when no round is left."""
        if not draft.turns:
            return Drop("no turns")
        reasons: list[str] = []
        system = [draft.system] if draft.system is not None else []
        turns: list[Message | None] = []
        for turn in draft.turns:
            role, problem = self._role_of(turn)
            if problem is not None:
                reasons.append(problem)
                turns.append(None)
            elif role != "system":
                turns.append(Message(role, turn.text))
            elif turns:
                reasons.append("system turn after the beginning")
            else:
                system.append(cast(str, turn.text))
        asked = self._ask_once(turns)
        if len(asked) < len(turns):
            reasons.append("questions in a row joined" if self.questions_in_a_row == "join" else "earlier question in a row")
        rounds, order_reasons = _good_rounds(asked)
        reasons += order_reasons
        if not rounds:
            return Drop(reasons[0] if len(set(reasons)) == 1 else "no round of question and answer")
        conversation = Conversation(
            messages=tuple(message for good in rounds for message in good),
            system="\n\n".join(system) if system else None,
            id=draft.id,
            source=draft.source,
        )
        return Changed((conversation,), tuple(reasons)) if reasons else conversation

    def _role_of(self, turn: Turn) -> tuple[Known, None] | tuple[Literal["user"], str]:
        """The role, or any role and what is wrong with the turn."""
        if turn.text is None:
            return "user", "turn without text"
        called = _plain(turn.role)
        if called in self.names:
            return self.names[called], None
        for role, names in (("user", _USER), ("assistant", _ASSISTANT), ("system", _SYSTEM), ("tool", _TOOL)):
            if called in names:
                return cast(Known, role), None
        return "user", "turn of unknown role"

    def _ask_once(self, turns: list[Message | None]) -> list[Message | None]:
        """`turns` with one question wherever several are in a row."""
        asked: list[Message | None] = []
        for is_question, run in groupby(turns, key=lambda turn: turn is not None and turn.role == "user"):
            found = list(run)
            if not is_question or len(found) == 1:
                asked += found
                continue
            texts = [turn.content or "" for turn in found if turn is not None]
            said = list(dict.fromkeys(text for text in texts if text.strip())) or texts[-1:]
            asked.append(Message("user", "\n\n".join(said) if self.questions_in_a_row == "join" else said[-1]))
        return asked


def _plain(name: str) -> str:
    """A name as names are compared."""
    return name.strip().lower()


def _good_rounds(turns: list[Message | None]) -> tuple[list[Round], list[str]]:
    """The good rounds and the reasons for what was left out; a None among the turns is one already accounted for."""
    first = next((index for index, turn in enumerate(turns) if turn is not None and turn.role == "user"), len(turns))
    reasons = ["answer before the first question"] if any(turn is not None for turn in turns[:first]) else []
    rounds: list[list[Message | None]] = []
    for turn in turns[first:]:
        if turn is not None and turn.role == "user":
            rounds.append([])
        rounds[-1].append(turn)
    good: list[Round] = []
    for candidate in rounds:
        if len(candidate) == 1:
            reasons.append("question without an answer")
            continue
        kept, round_reasons = _good_part(candidate)
        reasons += round_reasons
        if kept:
            good.append(kept)
    return good, reasons


def _good_part(candidate: list[Message | None]) -> tuple[Round, list[str]]:
    """The longest beginning of a round that is question, answer, and perhaps tool turns each followed by an answer."""
    kept: list[Message] = []
    reasons: list[str] = []
    complete = 0
    for turn in candidate:
        if turn is None:
            break
        before = kept[-1].role if kept else None
        if turn.role == "assistant" and before == "assistant":
            reasons.append("second answer in a row")
            continue
        if turn.role == "tool" and before == "user":
            reasons.append("tool turn before an answer")
            break
        kept.append(turn)
        if turn.role == "assistant":
            complete = len(kept)
    if complete < len(kept) and not reasons and None not in candidate:
        reasons.append("tool turn without an answer")
    return tuple(kept[:complete]), reasons
