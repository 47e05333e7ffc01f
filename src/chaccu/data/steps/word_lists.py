"""Word lists: YAML files of phrases and patterns that steps look for, shipped beside the steps or named by path.

Every regular expression in a list is compiled when the list is read, so a mistake is told before any data is. A list's hash
goes into the manifest: a changed list is another dataset.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from chaccu.artifact import storage_errors
from chaccu.errors import RecipeError

Form = TypeVar("Form")


def read_lists(names: tuple[str, ...], form: type[Form], patterns_in: Callable[[Form], Iterable[str]]) -> list[Form]:
    """Each list as a `form`: a shipped one by name, others by path.

    Raises `StorageError` when a file cannot be read, `RecipeError` naming the file for bad YAML, unknown keys, and patterns
    that are no regular expressions.
    """
    read = []
    for name in names:
        try:
            entry = msgspec.convert(yaml.safe_load(_bytes_of(name)) or {}, form)
            for pattern in patterns_in(entry):
                re.compile(pattern)
            read.append(entry)
        except (yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError, re.error) as error:
            raise RecipeError(
                f"the word list {name}: {error}.", remedy="take a shipped one under data/steps as the form"
            ) from error
    return read


def describe_lists(names: tuple[str, ...]) -> list[dict[str, str]]:
    """Name and SHA-256 of each list, for the manifest."""
    return [{"name": Path(name).name, "sha256": hashlib.sha256(_bytes_of(name)).hexdigest()} for name in names]


@lru_cache(maxsize=32)
def _bytes_of(name: str) -> bytes:
    """A list's bytes, read once a process, so that what is described is what is used."""
    shipped = resources.files("chaccu.data.steps") / f"{name}.yaml"
    if name.isidentifier() and shipped.is_file():
        return shipped.read_bytes()
    path = Path(name)
    with storage_errors(path):
        return path.read_bytes()
