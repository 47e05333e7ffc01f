"""Record marks: what a dump says of a whole record beside its turns, such as that its answers were made with plug-ins.

A record goes when one of the named keys is there with a value that says something: not null, false, 0 or empty. It is judged
before a reader sees it, so this works for dumps of every kind whose records are objects.
"""

from __future__ import annotations

from typing import Any, ClassVar

from chaccu.data.outcome import Drop, Step


class RecordMarks(Step, frozen=True):
    """`drop`: keys of a record. By default `plugins`, the mark of answers that lean on tool results which the dump leaves
    out."""

    name: ClassVar[str] = "record_marks"

    drop: tuple[str, ...] = ("plugins",)

    def judge_record(self, value: Any) -> Drop | None:
        if not isinstance(value, dict):
            return None
        return next((Drop(f"marked {key}") for key in self.drop if value.get(key)), None)
