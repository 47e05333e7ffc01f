"""`data diff`: what two datasets or files have in common, told by what the conversations say and by their ids.

Conversations with equal turns are the same wherever they stand; an id that is on both sides with other turns is changed.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from pathlib import Path

import msgspec

from chaccu.conversation import Conversation
from chaccu.data.records import list_files, read_conversations


class DiffReport(msgspec.Struct, frozen=True):
    """Conversations of each side: `same` on both, `changed` ids on both with other turns, and those of one side only, with
    the ids of the first few of each."""

    same: int
    changed: int
    only_first: int
    only_second: int
    changed_ids: list[str]
    only_first_ids: list[str]
    only_second_ids: list[str]

    @property
    def is_equal(self) -> bool:
        return not (self.changed or self.only_first or self.only_second)


def compare_datasets(first: Path, second: Path, *, shown: int = 10) -> DiffReport:
    """Compare two JSONL files or dataset folders (training and validation together); `shown` ids of each kind are listed.

    Raises `StorageError` and `DataError` when one cannot be read.
    """
    ours, theirs = _digest_all(first), _digest_all(second)
    counts = {digest: min(len(ids), len(theirs.get(digest, []))) for digest, ids in ours.items()}
    only_ours = [name for digest, ids in ours.items() for name in ids[counts[digest] :]]
    only_theirs = [name for digest, ids in theirs.items() for name in ids[counts.get(digest, 0) :]]
    changed, left = _match(only_ours, only_theirs)
    _, right = _match(only_theirs, only_ours)
    return DiffReport(
        same=sum(counts.values()),
        changed=len(changed),
        only_first=len(left),
        only_second=len(right),
        changed_ids=changed[:shown],
        only_first_ids=left[:shown],
        only_second_ids=right[:shown],
    )


def _digest_all(path: Path) -> dict[bytes, list[str]]:
    """Ids by the digest of system text and turns."""
    found: dict[bytes, list[str]] = {}
    for file in list_files(path):
        for conversation in read_conversations(file):
            found.setdefault(_digest(conversation), []).append(conversation.id)
    return found


def _digest(conversation: Conversation) -> bytes:
    return blake2b(msgspec.json.encode((conversation.system, conversation.messages)), digest_size=16).digest()


def _match(names: list[str], others: list[str]) -> tuple[list[str], list[str]]:
    """Those of `names` that find a partner among `others`, each of which is one's partner once, and the rest. Conversations
    without an id are not told apart by it and find none."""
    free = Counter(others)
    matched, rest = [], []
    for name in names:
        if name and free[name]:
            free[name] -= 1
            matched.append(name)
        else:
            rest.append(name)
    return matched, rest
