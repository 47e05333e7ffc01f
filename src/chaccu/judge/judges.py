"""`Judge`: whom to ask, out of `NAME` or `NAME=URL`; the prices of judges.

Invariants: the judges of a run have names of their own, for a verdict names its judge. It ignores whether anyone answers there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from chaccu.client import api_root
from chaccu.errors import UsageError
from chaccu.judge.budget import Price

_KEY_OPTION = "key-env="


class Judge(msgspec.Struct, frozen=True):
    """A judge: the model's name at the server, and the server. `key_variable`: the environment variable that holds the API key,
    where the judge has one of its own. `price`: where it is known."""

    name: str
    url: str
    key_variable: str | None = None
    price: Price | None = None


def parse_judges(
    texts: Sequence[str], url: str | None, *, prices: Mapping[str, Price] | None = None, price: Price | None = None
) -> list[Judge]:
    """Judges out of `NAME`, `NAME=URL` or `NAME=URL,key-env=VARIABLE`; `url` is that of those that name none.

    `prices`: by name; `price`: of those that are not in it. Raises `UsageError` for a judge without a URL, or named twice.
    """
    judges: dict[str, Judge] = {}
    for text in texts:
        name, _, own_url = text.partition("=")
        own_url, _, option = own_url.partition(",")
        if not name or (option and (not option.startswith(_KEY_OPTION) or option == _KEY_OPTION)):
            raise UsageError(f"{text!r} is no judge.", remedy="write it as NAME, NAME=URL or NAME=URL,key-env=VARIABLE")
        if name in judges:
            raise UsageError(f"the judge {name!r} is there twice.", remedy="let a gateway give the second another name")
        address = own_url or url
        if address is None:
            raise UsageError(f"the judge {name!r} has no URL.", remedy=f"--judge {name}=URL, or --url for all")
        own_price = (prices or {}).get(name, price)
        judges[name] = Judge(name, api_root(address), option.removeprefix(_KEY_OPTION) or None, own_price)
    return list(judges.values())
