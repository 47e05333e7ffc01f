"""Values as other trainers write them, mostly texts out of a command line.

Invariant: what cannot be read is a `RecipeError` that names its key.
"""

from __future__ import annotations

import math
import re
from typing import Any

from chaccu.errors import RecipeError

_TRUE, _FALSE = {"true", "1", "yes", "y", "on", "t", "auto"}, {"false", "0", "no", "n", "off", "f", "none", "null", ""}


def text(key: str, value: Any) -> str:
    """`value` as a text that says something."""
    if isinstance(value, (list, dict, bool)) or not str(value).strip():
        raise _unreadable(key, value, "a text")
    return str(value).strip()


def number(key: str, value: Any) -> float:
    """`value` as a finite number; YAML takes 1e-4 for a text."""
    try:
        read = math.nan if isinstance(value, (bool, list, dict)) else float(value)
    except ValueError as error:
        raise _unreadable(key, value, "a number") from error
    if not math.isfinite(read):
        raise _unreadable(key, value, "a number")
    return read


def whole(key: str, value: Any) -> int:
    """`value` as a whole number: 3, "3", 3.0."""
    read = number(key, value)
    if read != int(read):
        raise _unreadable(key, value, "a whole number")
    return int(read)


def truth(key: str, value: Any) -> bool:
    """`value` as yes or no; a flag without a value is a yes."""
    said = str(value).strip().lower()
    if said not in _TRUE | _FALSE or isinstance(value, (list, dict)):
        raise _unreadable(key, value, "true or false")
    return said in _TRUE


def switched_off(value: Any) -> bool:
    """Whether a value says that something is not wanted: false, 0, none, nothing."""
    said = str(value).strip().lower()
    return not value or said in _FALSE or re.fullmatch(r"0*\.?0*", said) is not None


def _unreadable(key: str, value: Any, wanted: str) -> RecipeError:
    remedy = "put the value in place of the variable" if "$" in str(value) else "correct it in the input"
    return RecipeError(f"{key} is {value!r}, where {wanted} is wanted.", remedy=remedy)
