"""The log of Chaccu's gateway (`--log-conversations`), one answer a line with all that was said before it:
`{"id": …, "time": …, "model": …, "finish_reason": …, "system": …, "messages": [{"role": …, "content": …}, …]}`.

A request carries its whole conversation, so a line repeats the lines that it goes on from: the last one stays, those before it
are left out. An answer that was not finished (`finish_reason` other than `stop` or `tool_calls`) is left out by itself, also
where a later line carries it along; what was said before it stays. Texts are compared without the white space around them,
since clients trim it. What waits for a line that goes on from it is bounded; beyond that, and from one file to the next, the
`forks` step drops beginnings where the longer conversation comes first.

Conversations with the same first round share a source, so that beginnings and forks are never on two sides of a split. Tool
calls become text as in `openai`; models, times and users are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from chaccu.data.outcome import Drop
from chaccu.data.readers import openai
from chaccu.data.records import Draft, RawRecord, Turn, qualified_source

_REASON = "finish_reason"
_GOES_ON = "goes_on"
COLUMNS = frozenset({"id", "time", "model", _REASON, "system", "messages", _GOES_ON})
_WHOLE = ("stop", "tool_calls")
_SHOWN_REASON = re.compile(r"[\w.-]{1,40}", re.ASCII)
_MAX_HELD_BYTES = 64 << 20


def recognises(value: Any) -> bool:
    """An object with a list of messages, and beside it when and why which model ended the answer."""
    return isinstance(value, dict) and isinstance(value.get("messages"), list) and {"time", "model", _REASON} <= value.keys()


def parse(value: Any, number: int, origin: str) -> Draft | Drop:
    """The line's turns, without an answer at the end that was cut off."""
    draft = openai.parse(value, number, origin)
    if isinstance(draft, Drop):
        return draft
    if value.get(_GOES_ON) is True:
        return Drop("beginning of a later conversation")
    system = value.get("system")
    if system is not None and not isinstance(system, str):
        return Drop("system is no text")
    turns, cut = draft.turns, _why_cut(value)
    if cut is not None and turns:
        turns = turns[: _length_before_last(turns)]
        if not turns:
            return Drop(f"answer was cut off ({cut})")
    return Draft(id=draft.id, source=qualified_source(origin, _name_stem(system, turns)), system=system, turns=turns)


def regroup(records: Iterable[RawRecord]) -> Iterator[RawRecord]:
    """The lines, those that a later one goes on from marked as such; a line with an answer that was cut off becomes that
    answer, and a line without it if what was said before is in no other."""
    lines = _Lines()
    for record in records:
        yield from lines.take(record)
    yield from lines.release()


class _Lines:
    """The lines that a later one may go on from, by a hash of all they say; in the order in which they came."""

    def __init__(self) -> None:
        self._held: dict[int, list[RawRecord]] = {}
        self._held_bytes = 0
        self._said: set[int] = set()
        self._whole: set[int] = set()
        self._cut: dict[int, list[str]] = {}

    def take(self, record: RawRecord) -> Iterator[RawRecord]:
        """What can be given away once `record` is known."""
        value = _decode(record.payload)
        draft = openai.parse(value, record.number, "")
        system = value.get("system") if recognises(value) else 0
        if isinstance(draft, Drop) or not draft.turns or not isinstance(system, (str, type(None))):
            yield record
            return
        beginnings = _hash_beginnings(system, draft.turns)
        turns = self._without_cut_answers(draft.turns, beginnings)
        cut = _why_cut(value)
        if cut is None:
            self._whole.add(beginnings[-1])
            yield from self._hold(record if turns == draft.turns else _write(record, draft.id, system, turns), beginnings)
            return
        self._cut.setdefault(beginnings[-2], []).append((turns[-1].text or "").strip())
        before = _length_before_last(turns)
        yield _write(record, draft.id, system, turns[before:], cut)
        if before and beginnings[before] not in self._said:
            yield from self._hold(_write(record, draft.id, system, turns[:before]), beginnings[: before + 1])

    def release(self) -> Iterator[RawRecord]:
        """All that is held."""
        for records in self._held.values():
            yield from records
        self._held.clear()

    def _hold(self, record: RawRecord, beginnings: list[int]) -> Iterator[RawRecord]:
        for beginning in beginnings[1:-1]:
            for earlier in self._held.pop(beginning, ()):
                self._held_bytes -= len(earlier.payload)
                marked = b'{"%s":true,%s' % (_GOES_ON.encode(), earlier.payload.lstrip()[1:])
                yield msgspec.structs.replace(earlier, payload=marked)
        self._held.setdefault(beginnings[-1], []).append(record)
        self._held_bytes += len(record.payload)
        self._said.update(beginnings[1:])
        while self._held_bytes > _MAX_HELD_BYTES:
            oldest = self._held.pop(next(iter(self._held)))
            self._held_bytes -= sum(len(earlier.payload) for earlier in oldest)
            yield from oldest

    def _without_cut_answers(self, turns: tuple[Turn, ...], beginnings: list[int]) -> tuple[Turn, ...]:
        """`turns` without the text of each answer before the last that was cut off when it was given. A client may have less
        of it than the log."""
        return tuple(
            Turn(turn.role, None)
            if place < len(turns) - 1
            and beginnings[place + 1] not in self._whole
            and any(text.startswith((turn.text or "").strip()) for text in self._cut.get(beginnings[place], ()))
            else turn
            for place, turn in enumerate(turns)
        )


def _decode(payload: bytes) -> Any:
    """The record's value, None for what is no JSON."""
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _write(
    record: RawRecord, record_id: str, system: str | None, turns: tuple[Turn, ...], reason: str = _WHOLE[0]
) -> RawRecord:
    """`record` with these turns."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    value = {"id": record_id, _REASON: reason, "system": system, "messages": messages}
    return msgspec.structs.replace(record, payload=msgspec.json.encode(value))


def _why_cut(value: dict[str, Any]) -> str | None:
    """Why the last answer is not a whole one, None if it is."""
    reason = value.get(_REASON)
    if reason in _WHOLE:
        return None
    return reason if isinstance(reason, str) and _SHOWN_REASON.fullmatch(reason) else "no known reason"


def _length_before_last(turns: tuple[Turn, ...]) -> int:
    """How many turns there are up to the answer before the last turn; 0 without one."""
    return max((place + 1 for place, turn in enumerate(turns[:-1]) if turn.role == "assistant"), default=0)


def _hash_beginnings(system: Any, turns: tuple[Turn, ...]) -> list[int]:
    """64 bits for each beginning of the conversation, the empty one first."""
    hashed = blake2b(_to_bytes(f"{system}\x1e"), digest_size=8)
    beginnings = [int.from_bytes(hashed.digest(), "big")]
    for turn in turns:
        hashed.update(_to_bytes(f"{turn.role}\x1f{(turn.text or '').strip()}\x1e"))
        beginnings.append(int.from_bytes(hashed.digest(), "big"))
    return beginnings


def _name_stem(system: str | None, turns: tuple[Turn, ...]) -> str:
    """A name for the conversation by its first round."""
    first = next((place for place, turn in enumerate(turns, start=1) if turn.role == "assistant"), len(turns))
    return f"{_hash_beginnings(system, turns[:first])[-1]:016x}"


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")
