"""A ChatGPT account's export: `conversations.json`, alone or in the export's zip.

A record holds a tree of messages (`mapping`) and the branch last looked at (`current_node`). That branch is the conversation;
every other leaf's branch is a fork, a record of its own under the id with `_1`, `_2`, … and the same source. Consecutive
messages of the assistant are one turn (a continued answer without a gap, others with a blank line between). Ignored: hidden
messages, the account's custom instructions, reasoning. A turn with a part that is no text (an image, a file) has no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from chaccu.data.outcome import Drop
from chaccu.data.readers.fields import join_parts, read_id, text_or_none
from chaccu.data.records import Draft, RawRecord, Turn, qualified_source

COLUMNS = frozenset({"id", "conversation_id", "mapping", "current_node"})
_NOT_SAID = frozenset({"thoughts", "reasoning_recap", "user_editable_context", "model_editable_context"})
_FORK = "fork"


def recognises(value: Any) -> bool:
    """An object with a `mapping` of nodes."""
    return isinstance(value, dict) and isinstance(value.get("mapping"), dict)


def regroup(records: Iterable[RawRecord]) -> Iterator[RawRecord]:
    """Each record, and after it one for each of its other branches, in the order of the mapping."""
    for record in records:
        yield record
        try:
            value = msgspec.json.decode(record.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # It is told when it is parsed.
            continue
        if not recognises(value):
            continue
        mapping = value["mapping"]
        current = set(_branch_to(mapping, _current_leaf(value)))
        others = [leaf for leaf in _list_leaves(mapping) if leaf not in current]
        for number, leaf in enumerate(others, start=1):
            branch = {node: mapping[node] for node in _branch_to(mapping, leaf)}
            fork = {"id": read_id(value, record.number, _id_key(value)), "current_node": leaf, "mapping": branch, _FORK: number}
            yield msgspec.structs.replace(record, payload=msgspec.json.encode(fork))


def parse(value: Any, number: int, origin: str) -> Draft | Drop:
    """The turns of the current branch; of a record without one, those of the last."""
    if not isinstance(value, dict):
        return Drop("record is no object")
    if not recognises(value):
        return Drop("record has no mapping of messages")
    conversation_id = read_id(value, number, _id_key(value))
    branch = _branch_to(value["mapping"], _current_leaf(value))
    fork = value.get(_FORK)
    return Draft(
        id=f"{conversation_id}_{fork}" if isinstance(fork, int) else conversation_id,
        source=qualified_source(origin, conversation_id),
        turns=_join_turns(value["mapping"][node] for node in branch),
    )


def _id_key(value: dict[str, Any]) -> str:
    return "conversation_id" if value.get("conversation_id") else "id"


def _parent_of(mapping: dict[str, Any], node: str) -> str | None:
    entry = mapping[node]
    parent = entry.get("parent") if isinstance(entry, dict) else None
    return parent if isinstance(parent, str) and parent in mapping else None


def _list_leaves(mapping: dict[str, Any]) -> list[str]:
    parents = {_parent_of(mapping, node) for node in mapping}
    return [node for node in mapping if node not in parents]


def _current_leaf(value: dict[str, Any]) -> str | None:
    current, mapping = value.get("current_node"), value["mapping"]
    if isinstance(current, str) and current in mapping:
        return current
    leaves = _list_leaves(mapping)
    return leaves[-1] if leaves else None


def _branch_to(mapping: dict[str, Any], leaf: str | None) -> list[str]:
    """The nodes from the root down to `leaf`; a tree that bites its tail ends where it does."""
    branch: dict[str, None] = {}
    while leaf is not None and leaf not in branch:
        branch[leaf] = None
        leaf = _parent_of(mapping, leaf)
    return list(branch)[::-1]


def _join_turns(nodes: Iterable[Any]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    continues = False
    for node in nodes:
        message = node.get("message") if isinstance(node, dict) else None
        if message is None or _is_unsaid(message):
            continue
        turn = _read_message(message)
        if turn.role == "assistant" and turns and turns[-1].role == "assistant":
            before = turns.pop()
            if turn.text is not None and before.text is not None:
                gap = "\n\n" if turn.text and before.text and not continues else ""
                turn = Turn("assistant", before.text + gap + turn.text)
            else:
                turn = Turn("assistant", None)
        continues = _dig(message, "metadata", "finish_details", "type") == "max_tokens"
        turns.append(turn)
    return tuple(turns)


def _is_unsaid(message: Any) -> bool:
    """Whether a message is none of the conversation: hidden, reasoning, or an empty system text."""
    if _dig(message, "metadata", "is_visually_hidden_from_conversation") is True:
        return True
    kind = _dig(message, "content", "content_type")
    if isinstance(kind, str) and kind in _NOT_SAID:
        return True
    return _dig(message, "author", "role") == "system" and not _read_text(_dig(message, "content"))


def _read_message(message: Any) -> Turn:
    return Turn(text_or_none(_dig(message, "author", "role")) or "", _read_text(_dig(message, "content")))


def _read_text(content: Any) -> str | None:
    """The text of a message, of code or of a tool's output, wherever its content type keeps it."""
    if not isinstance(content, dict):
        return None
    if content.get("parts") == []:
        return ""
    return next((text for key in ("parts", "text", "result") if (text := join_parts(content.get(key))) is not None), None)


def _dig(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
