"""`Aliases`: names that stand for models, one or several by weight.

Pure policy. Invariants: of any run of requests for an alias each of its models gets its share, to within one request (smooth
weighted round robin: every model gains its weight, the one with most is chosen and pays the sum); a model that is not served is
left out while another is. It ignores who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from chaccu.errors import UsageError

_MAX_NAME_CHARS = 200
_MAX_WEIGHT = 1e6


class Aliases:
    """The aliases of one gateway."""

    def __init__(self, given: Mapping[str, Mapping[str, float]]) -> None:
        """Raises `UsageError` as `set` does."""
        self._shares: dict[str, dict[str, float]] = {}
        self._credit: dict[str, dict[str, float]] = {}
        for name, shares in given.items():
            self.set(name, shares)

    def set(self, name: str, shares: Mapping[str, float]) -> None:
        """Let `name` stand for models by weight. Raises `UsageError` for what is no name, no weight, or leads to an alias."""
        if not name.isprintable() or not 0 < len(name) <= _MAX_NAME_CHARS:
            raise UsageError(f"{name!r:.220} is no name.", remedy=f"1 to {_MAX_NAME_CHARS} printable characters")
        if not shares:
            raise UsageError(f"the alias {name!r} stands for no model.", remedy="name one or more")
        for model, weight in shares.items():
            if not 0 < weight <= _MAX_WEIGHT:
                raise UsageError(f"{model!r} has the weight {weight:g}.", remedy=f"above 0, up to {_MAX_WEIGHT:g}")
            if model == name or model in self._shares:
                raise UsageError(f"{name!r} would stand for {model!r}, which is an alias.", remedy="name models themselves")
        if any(name in other for other in self._shares.values()):
            raise UsageError(f"{name!r} is what another alias stands for.", remedy="choose another name")
        self._shares[name] = dict(shares)
        self._credit[name] = dict.fromkeys(shares, 0.0)

    def remove(self, name: str) -> bool:
        """Forget the alias; False when there is none."""
        self._credit.pop(name, None)
        return self._shares.pop(name, None) is not None

    def __contains__(self, name: str) -> bool:
        return name in self._shares

    def shares(self) -> dict[str, dict[str, float]]:
        """Models and their weights, by alias."""
        return {name: dict(shares) for name, shares in self._shares.items()}

    def resolve(self, name: str, is_served: Callable[[str], bool]) -> str:
        """The model that answers a request for `name`: itself, where that is no alias."""
        shares = self._shares.get(name)
        if shares is None:
            return name
        if len(shares) == 1:
            return next(iter(shares))
        candidates = [model for model in shares if is_served(model)] or list(shares)
        credit = self._credit[name]
        for model in candidates:
            credit[model] += shares[model]
        chosen = max(candidates, key=credit.__getitem__)
        credit[chosen] -= sum(shares[model] for model in candidates)
        return chosen


def parse_alias(text: str) -> tuple[str, dict[str, float]]:
    """An alias from `NAME=MODEL`, or `NAME=MODEL:WEIGHT,MODEL:WEIGHT`. Raises `UsageError` when it is not of that form."""
    name, _, rest = text.partition("=")
    shares: dict[str, float] = {}
    for part in rest.split(","):
        model, _, weight = part.rpartition(":") if "," in rest else (part, "", "1")
        try:
            shares[model] = float(weight)
        except ValueError:
            model = ""
        if not name or not model:
            raise UsageError(
                f"{text!r} is no alias.", remedy="write it as NAME=MODEL, or NAME=MODEL:9,OTHER:1 to split by weight"
            )
    return name, shares
