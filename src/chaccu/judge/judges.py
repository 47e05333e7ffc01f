"""`Judge`: whom to ask, out of `NAME` or `NAME=URL`; the prices of judges.

Invariants: the judges of a run have names of their own, for a verdict names its judge. It ignores whether anyone answers there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chaccu.judge.addresses import ModelAddress, parse_addresses
from chaccu.judge.budget import Price


class Judge(ModelAddress, frozen=True):
    """A judge: the model's name at the server, and the server. `price`: where it is known."""

    price: Price | None = None


def parse_judges(
    texts: Sequence[str], url: str | None, *, prices: Mapping[str, Price] | None = None, price: Price | None = None
) -> list[Judge]:
    """Judges out of `NAME`, `NAME=URL` or `NAME=URL,key-env=VARIABLE`; `url` is that of those that name none.

    `prices`: by name; `price`: of those that are not in it. Raises `UsageError` for one without a URL, or with two.
    """
    addresses = parse_addresses(texts, url, what="judge")
    return [Judge(one.name, one.url, one.key_variable, (prices or {}).get(one.name, price)) for one in addresses]
