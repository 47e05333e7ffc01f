"""Word lists: YAML files of phrases and patterns that steps look for, shipped beside the steps or named by path.

Every regular expression in a list is compiled when the list is read, so a mistake is told before any data is. A list's hash
goes into the manifest: a changed list is another dataset. A relative path is that of the folder in which the step was built,
wherever the process goes afterwards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from chaccu.artifact import storage_errors
from chaccu.data.steps.plain_yaml import parse_yaml
from chaccu.errors import RecipeError

Form = TypeVar("Form")


def locate_lists(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of shipped lists as they are, paths made absolute: what a step remembers its lists by."""
    return tuple(name if _shipped_file(name) is not None else str(Path(name).absolute()) for name in names)


def read_lists(names: tuple[str, ...], form: type[Form], patterns_in: Callable[[Form], Iterable[str]]) -> list[Form]:
    """Each list as a `form`: a shipped one by name, others by path. `patterns_in` names its patterns as they are used.

    Raises `StorageError` when a file cannot be read, `RecipeError` naming the file for bad YAML, unknown keys, and patterns
    that are no regular expressions.
    """
    read = []
    for name in names:
        try:
            entry = msgspec.convert(_parse(name), form)
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


def _parse(name: str) -> Any:
    value = parse_yaml(_bytes_of(name))
    return {} if value is None else value


def _shipped_file(name: str) -> Traversable | None:
    file = resources.files("chaccu.data.steps") / f"{name}.yaml"
    return file if name.isidentifier() and file.is_file() else None


def _bytes_of(name: str) -> bytes:
    return _read_once(*locate_lists((name,)))


@lru_cache(maxsize=32)
def _read_once(name: str) -> bytes:
    """A list's bytes, read once a process, so that what is described is what is used."""
    file = _shipped_file(name)
    if file is not None:
        return file.read_bytes()
    path = Path(name)
    with storage_errors(path):
        return path.read_bytes()
