"""OpenAssistant trees: nested (`{"message_tree_id": …, "prompt": {"text": …, "role": …, "replies": […]}}`) or one message a row
(`message_id`, `parent_id`, `message_tree_id`, `text`, `role`), in JSON lines or parquet.

Of a tree the best-ranked path is the conversation: from the prompt down, at each message the reply of the lowest rank, and
the first of those without one. Deleted messages, and those that reviewers refused, are passed by with what hangs from them.
The rows of one tree stand beside one another in these sets; rows that do not are trees without a beginning.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from chaccu.data.outcome import Drop
from chaccu.data.readers.fields import read_id, text_or_none
from chaccu.data.records import Draft, RawRecord, Turn, qualified_source

_TREE = "message_tree_id"
_ROWS = "rows"
COLUMNS = frozenset(
    {_TREE, "prompt", "message_id", "parent_id", "text", "role", "rank", "deleted", "review_result"},
)
_MAX_TREE_BYTES = 64 << 20


class _Row(msgspec.Struct):
    message_tree_id: str
    parent_id: str | None
    message_id: str


def recognises(value: Any) -> bool:
    """A nested tree, or a row of one."""
    if not isinstance(value, dict):
        return False
    prompt = value.get("prompt")
    nested = isinstance(prompt, dict) and "role" in prompt and "text" in prompt
    return nested or (isinstance(value.get(_TREE), str) and ("parent_id" in value or isinstance(value.get(_ROWS), list)))


def regroup(records: Iterable[RawRecord]) -> Iterator[RawRecord]:
    """Rows of one tree that follow one another as one record; nested trees as they are."""
    decoder = msgspec.json.Decoder(_Row)
    group: list[RawRecord] = []
    tree: str | None = None
    size = 0
    for record in records:
        try:
            of_tree = decoder.decode(record.payload).message_tree_id
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            of_tree = None
        if group and (of_tree != tree or size > _MAX_TREE_BYTES):
            yield _join_rows(group)
            group, size = [], 0
        if of_tree is None:
            yield record
            continue
        tree = of_tree
        group.append(record)
        size += len(record.payload)
    if group:
        yield _join_rows(group)


def _join_rows(rows: list[RawRecord]) -> RawRecord:
    tree = msgspec.json.decode(rows[0].payload, type=_Row).message_tree_id
    payload = b'{"%s":%s,"%s":[%s]}' % (
        _TREE.encode(),
        msgspec.json.encode(tree),
        _ROWS.encode(),
        b",".join(row.payload for row in rows),
    )
    return RawRecord(rows[0].number, payload, rows[0].start, rows[-1].end)


def parse(value: Any, number: int, origin: str) -> Draft | Drop:
    """The turns of the best-ranked path."""
    if not isinstance(value, dict):
        return Drop("record is no object")
    rows = value.get(_ROWS)
    prompt = value.get("prompt") if rows is None else _plant_tree(rows)
    if not isinstance(prompt, dict):
        return Drop("record has no tree of messages" if rows is None else "tree without its first message")
    tree_id = read_id(value, number, _TREE)
    turns = tuple(
        Turn(text_or_none(message.get("role")) or "", text_or_none(message.get("text"))) for message in _best_path(prompt)
    )
    return Draft(id=tree_id, source=qualified_source(origin, tree_id), turns=turns)


def _plant_tree(rows: Any) -> dict[str, Any] | None:
    """Rows as a nested tree; None when the first message is not among them."""
    messages = [dict(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    replies: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    root = None
    for message in messages:
        parent = message.get("parent_id")
        if isinstance(parent, str):
            replies[parent].append(message)
        elif root is None:
            root = message
    for message in messages:
        name = message.get("message_id")
        # Each list of replies is given away once, so that no two messages of one id make the tree endless.
        message["replies"] = replies.pop(name, []) if isinstance(name, str) else []
    return root


def _best_path(prompt: dict[str, Any]) -> Iterator[dict[str, Any]]:
    message: dict[str, Any] | None = prompt
    while message is not None:
        yield message
        replies = message.get("replies")
        good = [reply for reply in replies if _is_good(reply)] if isinstance(replies, list) else []
        message = min(good, key=_rank_of, default=None)


def _is_good(reply: Any) -> bool:
    return isinstance(reply, dict) and reply.get("deleted") is not True and reply.get("review_result") is not False


def _rank_of(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, (int, float)) and not isinstance(rank, bool) else float("inf")
