"""Records to judgements, in this process or in several: what a worker does with a chunk, and in which order results come
back. Other places to judge in are functions of the form `Judging`.

Invariants: results come in the order of the input wherever and by how many workers they are made, and hold everything that
the one writing process needs, so output does not depend on that. At most a few chunks are in flight, so memory does not
grow with the input. Workers end with their parent, even when it is killed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar, cast

import msgspec

from chaccu.conversation import Conversation
from chaccu.data.config import CleanConfig
from chaccu.data.ledger import Action
from chaccu.data.outcome import (
    Changed,
    ConversationStep,
    CorpusStep,
    DraftStep,
    Drop,
    Joined,
    Outcome,
    PartsStep,
    RecordStep,
    Trimmed,
)
from chaccu.data.readers import load_reader
from chaccu.data.records import Draft, RawRecord, count_chars
from chaccu.data.stats import Summary, summarise

READ_STEP = "read"
_SNIPPET_CHARS = 400


class Note(msgspec.Struct, frozen=True):
    """A ledger row to be."""

    step: str
    action: Action
    reason: str
    before_chars: int
    after_chars: int


class Check(msgspec.Struct, frozen=True):
    """A question to the index of the corpus step at this place in the configuration."""

    step: int
    digest: Any
    before_chars: int


class Kept(msgspec.Struct, frozen=True):
    """One conversation to be written: its line (with newline), what it is a part of, its summary."""

    line: bytes
    source: str
    summary: Summary


class JoinedRecord(msgspec.Struct, frozen=True):
    """A record whose turns went to an earlier one, and the row that says so."""

    id: str
    note: Note


class Judgement(msgspec.Struct, frozen=True):
    """One record, judged: what happened to it in order; `kept` is empty exactly when the last event is a drop. The records
    that were `joined` to it share its fate."""

    id: str
    events: tuple[Note | Check, ...]
    kept: tuple[Kept, ...]
    snippet: str
    joined: tuple[JoinedRecord, ...] = ()


class Chunk(msgspec.Struct, frozen=True):
    """Records of one origin, for one reader."""

    origin: str
    reader: str
    records: list[RawRecord]


# The origin and the judgements of each chunk, in order. Closing it early lets go of all that it uses.
Judged = Generator[tuple[str, list[Judgement]]]
Judging = Callable[[CleanConfig, Iterable[Chunk]], Judged]

_Pending = TypeVar("_Pending")


def judge_chunks(config: CleanConfig, chunks: Iterable[Chunk], workers: int) -> Judged:
    """Each chunk's origin with the judgements of its records. With one worker everything happens in this process."""
    if workers <= 1:
        for chunk in chunks:
            yield chunk.origin, judge_chunk(config, chunk)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        yield from pass_in_order(
            chunks,
            submit=lambda chunk: pool.submit(judge_chunk, config, chunk),
            collect=lambda future: future.result(),
            most=2 * workers,
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def pass_in_order(
    chunks: Iterable[Chunk],
    submit: Callable[[Chunk], _Pending],
    collect: Callable[[_Pending], list[Judgement]],
    most: int,
) -> Judged:
    """Have up to `most` chunks judged at a time, by whatever `submit` hands them to; results in the order of `chunks`."""
    in_flight: deque[tuple[str, _Pending]] = deque()
    for chunk in chunks:
        in_flight.append((chunk.origin, submit(chunk)))
        if len(in_flight) > most:
            origin, pending = in_flight.popleft()
            yield origin, collect(pending)
    while in_flight:
        origin, pending = in_flight.popleft()
        yield origin, collect(pending)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


class _Stage(msgspec.Struct, frozen=True):
    """A step behind `roles`, by its kind: exactly one of `judge` and `corpus` is set."""

    place: int
    name: str
    judge: ConversationStep | None
    corpus: CorpusStep | None


class _Plan(msgspec.Struct, frozen=True):
    """The configuration's steps sorted out by kind, once a chunk: telling a protocol apart is slow."""

    marks: list[tuple[str, RecordStep]]
    parts: tuple[str, PartsStep] | None
    roles: tuple[str, DraftStep]
    stages: list[_Stage]


class _Drafted(msgspec.Struct):
    """A draft on its way, with what happened to it before `roles`; `fate` is set when it goes no further."""

    draft: Draft
    events: tuple[Note, ...] = ()
    fate: Joined | Drop | None = None
    joined: tuple[JoinedRecord, ...] = ()


def _build_plan(config: CleanConfig) -> _Plan:
    marks: list[tuple[str, RecordStep]] = []
    parts: tuple[str, PartsStep] | None = None
    roles: tuple[str, DraftStep] | None = None
    stages: list[_Stage] = []
    for place, step in enumerate(config.steps):
        if isinstance(step, RecordStep):
            marks.append((step.name, step))
        elif isinstance(step, PartsStep):
            parts = (step.name, step)
        elif isinstance(step, DraftStep):
            roles = (step.name, step)
        elif isinstance(step, CorpusStep):
            stages.append(_Stage(place, step.name, None, step))
        else:
            stages.append(_Stage(place, step.name, cast(ConversationStep, step), None))
    assert roles is not None
    return _Plan(marks, parts, roles, stages)


def judge_chunk(config: CleanConfig, chunk: Chunk) -> list[Judgement]:
    """Run the reader and the steps over every record of a chunk; joined records are in the judgement of their leader. Never
    raises for what a record holds."""
    plan = _build_plan(config)
    read = [_read_draft(plan, chunk, record) for record in chunk.records]
    if plan.parts is not None:
        _join_parts(plan.parts, [entry for entry in read if isinstance(entry, _Drafted)])
    return [
        entry if isinstance(entry, Judgement) else _judge_draft(plan, entry)
        for entry in read
        if isinstance(entry, Judgement) or not isinstance(entry.fate, Joined)
    ]


def _join_parts(parts: tuple[str, PartsStep], drafted: list[_Drafted]) -> None:
    """Let the step that knows parts settle which drafts go on, and with what."""
    name, step = parts
    for entry, outcome in zip(drafted, step.join_parts([entry.draft for entry in drafted]), strict=True):
        before = entry.draft.chars if outcome is not entry.draft else 0
        if isinstance(outcome, Joined):
            entry.fate = outcome
            leader = drafted[outcome.leader]
            note = Note(name, "changed", outcome.reason, before, outcome.new_chars)
            leader.joined = (*leader.joined, JoinedRecord(entry.draft.id, note))
        elif isinstance(outcome, Drop):
            entry.fate = outcome
            entry.events = (Note(name, "dropped", outcome.reason, before, 0),)
        elif isinstance(outcome, Trimmed):
            entry.draft = outcome.draft
            entry.events = (Note(name, "changed", outcome.reason, before, outcome.draft.chars),)
        else:
            entry.draft = outcome


def _judge_draft(plan: _Plan, entry: _Drafted) -> Judgement:
    draft = entry.draft
    if entry.fate is not None:
        return Judgement(draft.id, entry.events, (), _snippet_of(draft))
    events: list[Note | Check] = [*entry.events]
    roles_name, roles = plan.roles
    kept = _note_outcome(roles_name, roles.order_turns(draft), draft.chars, events)
    tokens: tuple[int, ...] = ()
    for stage in plan.stages:
        if not kept:
            break
        chars = count_chars(kept[0])
        if stage.corpus is not None:
            events.append(Check(stage.place, stage.corpus.digest(kept[0]), chars))
        elif stage.judge is not None:
            outcome = stage.judge(kept[0])
            kept = _note_outcome(stage.name, outcome, chars, events)
            tokens = outcome.tokens if isinstance(outcome, Changed) else tokens
    written = tuple(map(_keep, kept, tokens or (None,) * len(kept)))
    return Judgement(draft.id, tuple(events), written, _snippet_of(draft), entry.joined)


def _note_outcome(step: str, outcome: Outcome, before: int, events: list[Note | Check]) -> tuple[Conversation, ...]:
    """Append the ledger rows of an outcome; returns what goes on."""
    if isinstance(outcome, Drop):
        events.append(Note(step, "dropped", outcome.reason, before, 0))
        return ()
    if isinstance(outcome, Changed):
        after = sum(count_chars(conversation) for conversation in outcome.conversations)
        events.extend(Note(step, "changed", reason, before, after) for reason in dict.fromkeys(outcome.reasons))
        return outcome.conversations
    return (outcome,)


def _keep(conversation: Conversation, tokens: int | None) -> Kept:
    return Kept(msgspec.json.encode(conversation) + b"\n", conversation.source, summarise(conversation, tokens))


def _read_draft(plan: _Plan, chunk: Chunk, record: RawRecord) -> _Drafted | Judgement:
    """The record's draft, or the judgement of a record that goes no further."""
    value = _decode(record)
    draft = value if isinstance(value, Drop) else load_reader(chunk.reader).parse(value, record.number, chunk.origin)
    if isinstance(draft, Drop):
        note = Note(READ_STEP, "dropped", draft.reason, len(record.payload), 0)
        snippet = record.payload[:_SNIPPET_CHARS].decode("utf-8", errors="replace")
        return Judgement(f"record-{record.number}", (note,), (), snippet)
    for name, step in plan.marks:
        marked = step.judge_record(value)
        if marked is not None:
            return Judgement(draft.id, (Note(name, "dropped", marked.reason, draft.chars, 0),), (), _snippet_of(draft))
    return _Drafted(draft)


def parse_record(reader: str, origin: str, record: RawRecord) -> Draft | Drop:
    """What the reader makes of a record, or a `Drop` when it is no JSON. Never raises for what a record holds."""
    value = _decode(record)
    return value if isinstance(value, Drop) else load_reader(reader).parse(value, record.number, origin)


def are_parts(reader: str, origin: str, first: RawRecord, second: RawRecord) -> bool:
    """Whether two records hold parts of one source conversation."""
    one, other = (parse_record(reader, origin, record) for record in (first, second))
    return isinstance(one, Draft) and isinstance(other, Draft) and one.source == other.source


def _decode(record: RawRecord) -> Any:
    """The record's value, or a `Drop` when it is no JSON."""
    try:
        return msgspec.json.decode(record.payload)
    except UnicodeDecodeError:
        return Drop("invalid UTF-8")
    except RecursionError:
        return Drop("nested too deeply")
    except msgspec.DecodeError as error:
        return Drop("lone surrogate" if "surrogate" in str(error) else "invalid JSON")


def _snippet_of(draft: Draft) -> str:
    """The beginning of the first turns, for the report's samples."""
    share = _SNIPPET_CHARS // 2
    return "\n".join(f"{turn.role or '?'}: {(turn.text or '')[:share]}" for turn in draft.turns[:2])
