"""The list of models, as OpenAI's API gives it.

Invariant: a key sees what it may use, and an alias is listed while a model of its is served. It ignores who serves a model.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from chaccu.serve.gateway.access.aliases import Aliases
from chaccu.serve.gateway.access.keys import Key


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model or an alias. `created`: when the gateway began, in seconds since 1970; `max_model_len`: its context in tokens,
    None where an upstream has not said it.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "chaccu"
    max_model_len: int | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The models that answer now, by name."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


def list_models(contexts: dict[str, int | None], aliases: Aliases, key: Key | None, created_s: int) -> ModelList:
    """The list for `key` of the models in `contexts`, which gives their contexts in tokens."""
    named = dict(contexts)
    for alias, shares in aliases.shares().items():
        served = [contexts[model] for model in shares if model in contexts]
        if served:
            named[alias] = min((tokens for tokens in served if tokens is not None), default=None)
    return ModelList(
        data=[
            ServedModel(id=name, created=created_s, max_model_len=named[name])
            for name in sorted(named)
            if key is None or key.may_use(name)
        ]
    )
