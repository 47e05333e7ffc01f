"""Readers: one module a kind of dump, which knows where its records keep their turns.

A reader module has `recognises(value)`, whether a decoded record is of its kind, and `parse(value, number, origin)`, which
makes a `Draft` of it or a `Drop` that says what is wrong with its shape. Neither raises, whatever the value. Readers leave
roles and order to the steps.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

from chaccu.data.outcome import Drop
from chaccu.data.records import Draft
from chaccu.errors import UsageError, did_you_mean


class Reader(Protocol):
    """What a reader module offers."""

    def recognises(self, value: Any, /) -> bool: ...

    def parse(self, value: Any, number: int, origin: str, /) -> Draft | Drop: ...


def list_readers() -> dict[str, str]:
    """Module of each reader by name, in the order in which an unnamed dump is offered to them."""
    return {
        "sharegpt": "chaccu.data.readers.sharegpt",
        "chaccu": "chaccu.data.readers.chaccu",
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
