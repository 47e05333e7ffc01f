"""Texts that a client may give as token ids: one, or several.

Invariant: every refusal is an `ApiError` that names the parameter. It ignores which ids there are.
"""

from __future__ import annotations

from typing import Any

from chaccu.serve.gateway.errors import bad_request

_MAX_ID = 2**31 - 1
ID = {"type": "integer", "minimum": 0, "maximum": _MAX_ID}
_IDS = {"type": "array", "minItems": 1, "items": ID}
_TEXT = {"type": "string", "minLength": 1}


def describe_texts(limit: int) -> dict[str, Any]:
    """The JSON schema of what `read_texts` takes."""
    return {
        "anyOf": [
            _TEXT,
            _IDS,
            *({"type": "array", "minItems": 1, "maxItems": limit, "items": form} for form in (_TEXT, _IDS)),
        ]
    }


def read_texts(given: Any, param: str, limit: int) -> list[str | list[int]]:
    """What `param` gives, each a text or token ids; a list of integers is one of them. Raises `ApiError` for more than `limit`,
    and for what is empty or neither.
    """
    several = given if isinstance(given, list) and not (given and read_ids(given)) else [given]
    if not 1 <= len(several) <= limit:
        raise bad_request(f"there are {len(several):,} {param}s; send 1 to {limit:,}.", code="invalid_value", param=param)
    texts: list[str | list[int]] = []
    for index, one in enumerate(several):
        read = one if isinstance(one, str) else read_ids(one)
        if not read:
            message = f"{param} {index} = {one!r:.80} is neither a text nor a list of token ids, or it is empty."
            raise bad_request(message, code="invalid_value", param=param)
        texts.append(read)
    return texts


def read_ids(value: Any) -> list[int] | None:
    """Token ids, None for what is none. JSON has one kind of number: 5.0 is 5."""
    if not isinstance(value, list):
        return None
    ids = [int(one) if isinstance(one, float) and one.is_integer() else one for one in value]
    return ids if all(type(one) is int and 0 <= one <= _MAX_ID for one in ids) else None
