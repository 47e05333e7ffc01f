"""Readers: one module a kind of dump, which knows where its records keep their turns.

A reader module has `recognises(value)`, whether a decoded record is of its kind; `parse(value, number, origin)`, which
makes a `Draft` of it or a `Drop` that says what is wrong with its shape; and `COLUMNS`, the keys it reads, so that of a
table with many columns only those are read. Neither function raises, whatever the value. Readers leave roles and order to
the steps.

A reader whose records are not one conversation each also has `regroup(records)`: records of the file to records that are
(several for a tree with branches, one for several rows of one tree).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

from chaccu.data.outcome import Drop
from chaccu.data.records import Draft, RawRecord
from chaccu.errors import UsageError, did_you_mean


class Reader(Protocol):
    """What a reader module offers."""

    COLUMNS: frozenset[str]

    def recognises(self, value: Any, /) -> bool: ...

    def parse(self, value: Any, number: int, origin: str, /) -> Draft | Drop: ...


def list_readers() -> dict[str, str]:
    """Module of each reader by name, in the order in which an unnamed dump is offered to them."""
    return {
        "oasst": "chaccu.data.readers.oasst",
        "chatgpt": "chaccu.data.readers.chatgpt",
        "lmsys": "chaccu.data.readers.lmsys",
        "sharegpt": "chaccu.data.readers.sharegpt",
        "gateway": "chaccu.data.readers.gateway",
        "openai": "chaccu.data.readers.openai",
        "chaccu": "chaccu.data.readers.chaccu",
        "alpaca": "chaccu.data.readers.alpaca",
    }


@lru_cache(maxsize=32)
def load_reader(name: str) -> Reader:
    """The reader called `name`. Raises `UsageError` with the nearest names when there is none."""
    modules = list_readers()
    if name not in modules:
        raise UsageError(f"there is no reader {name!r}.", remedy=did_you_mean(name, modules))
    return cast(Reader, import_module(modules[name]))


def recognise_reader(value: Any) -> str | None:
    """Name of the first reader that recognises a decoded record, or None."""
    return next((name for name in list_readers() if load_reader(name).recognises(value)), None)


def regroup_records(name: str, records: Iterable[RawRecord]) -> Iterator[RawRecord]:
    """`records` as the reader called `name` wants them: one conversation each."""
    regroup: Callable[[Iterable[RawRecord]], Iterator[RawRecord]] | None = getattr(load_reader(name), "regroup", None)
    return iter(records) if regroup is None else regroup(records)


def list_columns() -> frozenset[str]:
    """Every key that some reader reads."""
    return frozenset().union(*(load_reader(name).COLUMNS for name in list_readers()))
