"""Record marks: what a dump says of a whole record beside its turns, such as that its answers were made with plug-ins.

A record goes when one of the named keys is there with a value that says something: not null, false, 0 or empty. What is judged
is the record as its reader gets it, once the reader has read it: of a table only the columns that some reader knows, of rows
that make one tree or a branch of an export only what the reader puts together.
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
