"""`ModelAddress`: where a model that answers or judges is served: `NAME`, `NAME=URL` or `NAME=URL,key-env=VARIABLE`.

Invariants: the models of a run have names of their own, for an answer names its model; an API key is named by its environment
variable, never given. It ignores whether anyone answers there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from chaccu.client import api_root
from chaccu.errors import UsageError

_KEY_OPTION = "key-env="


class ModelAddress(msgspec.Struct, frozen=True):
    """`key_variable`: the environment variable that holds the API key, where the server has one of its own."""

    name: str
    url: str
    key_variable: str | None = None

    def find_key(self, otherwise: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
        """The API key; `otherwise` where none of its own is named. Raises `UsageError` where the variable is empty."""
        if self.key_variable is None:
            return otherwise
        key = environment.get(self.key_variable)
        if not key:
            raise UsageError(f"{self.key_variable} holds no API key for {self.name}.", remedy="set it, or name another")
        return key


def parse_addresses(texts: Sequence[str], url: str | None, *, what: str = "model") -> list[ModelAddress]:
    """`url` is that of the models that name none; `what` they are called in messages.

    Raises `UsageError` for one without a URL, or named for two servers.
    """
    addresses: dict[str, ModelAddress] = {}
    for text in texts:
        name, _, own_url = text.partition("=")
        own_url, _, option = own_url.partition(",")
        if not name or (option and (not option.startswith(_KEY_OPTION) or option == _KEY_OPTION)):
            raise UsageError(f"{text!r} is no {what}.", remedy="write it as NAME, NAME=URL or NAME=URL,key-env=VARIABLE")
        found = own_url or url
        if found is None:
            raise UsageError(f"the {what} {name!r} has no URL.", remedy=f"--{what} {name}=URL, or --url for all")
        address = ModelAddress(name, api_root(found), option.removeprefix(_KEY_OPTION) or None)
        if addresses.setdefault(name, address) != address:
            raise UsageError(f"the {what} {name!r} is there twice.", remedy="let a gateway give the second another name")
    return list(addresses.values())
