"""`Price`, `Estimate` and `Budget`: what judging may cost, is likely to cost and has cost, in US dollars.

Invariants: with a cap, a request is sent only if its dearest outcome still fits beside all that are under way, so the cap
holds as far as the count of tokens does; what does not fit is left, never half paid. It ignores which judge is worth it.
"""

from __future__ import annotations

import asyncio
import math
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from chaccu.artifact import storage_errors
from chaccu.conversation import Message
from chaccu.errors import DataError

CountTokens = Callable[[Sequence[str]], int]

_BYTES_PER_TOKEN = 4


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """US dollars per million tokens, read and written."""

    input: float
    output: float

    def cost_usd(self, prompt_tokens: int, answer_tokens: int) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.input + answer_tokens * self.output) / 1e6


def read_prices(file: Path) -> dict[str, Price]:
    """Prices by the judge's name, out of TOML: `input` and `output` in a table a judge. Raises `DataError`, `StorageError`."""
    with storage_errors(file):
        data = file.read_bytes()
    try:
        prices = msgspec.convert(tomllib.loads(data.decode()), dict[str, Price], strict=False)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DataError(f"{file} holds no prices: {error}.", remedy='["NAME"], then input = 2.5 and output = 10') from error
    for name, price in prices.items():
        if not all(math.isfinite(one) and one >= 0 for one in (price.input, price.output)):
            raise DataError(f"{file}: the price of {name} is {price.input:g} and {price.output:g}.", remedy="0 or more")
    return prices


def count_by_bytes(texts: Sequence[str]) -> int:
    """Tokens of `texts`, taken as one for four bytes of UTF-8, rounded up.

    Of English a token is about four letters; of scripts whose letters have two or three bytes it is fewer letters.
    """
    return -(-sum(len(text.encode(errors="surrogatepass")) for text in texts) // _BYTES_PER_TOKEN)


def count_prompt(count_tokens: CountTokens, system: str, messages: Sequence[Message]) -> int:
    """Tokens of a request, without those of the judge's own chat format."""
    return count_tokens([system, *(message.content or "" for message in messages)])


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What one judge is to be asked: requests that are not on file, the tokens they send, and the most that come back.

    `cost_usd`: of these tokens, where there is a price; answers are mostly shorter, and repeats are not in it.
    """

    judge: str
    requests: int
    prompt_tokens: int
    answer_tokens: int
    cost_usd: float | None


class Budget:
    """A cap on the spending of one run, shared by all its judges; without `cap_usd` it only adds up."""

    def __init__(self, cap_usd: float | None = None) -> None:
        self.cap_usd = cap_usd
        self.spent_usd = 0.0
        self.is_closed = False
        self._reserved_usd = 0.0
        self._under_way = 0
        self._settled = asyncio.Event()

    async def reserve(self, most_usd: float) -> bool:
        """Set `most_usd` aside for a request, waiting for others to settle where that may make room.

        False once a request does not fit with nothing under way: the budget is closed from then on.
        """
        while not self.is_closed and not self._fits(most_usd):
            if not self._under_way:
                self.is_closed = True
                break
            self._settled.clear()
            await self._settled.wait()
        if self.is_closed:
            return False
        self._reserved_usd += most_usd
        self._under_way += 1
        return True

    def settle(self, most_usd: float, cost_usd: float) -> None:
        """Put what a request cost in the place of what was set aside for it."""
        self._under_way -= 1
        # Sums of floats leave crumbs, which nothing under way can owe.
        self._reserved_usd = self._reserved_usd - most_usd if self._under_way else 0.0
        self.spent_usd += cost_usd
        self._settled.set()

    def _fits(self, most_usd: float) -> bool:
        # A sum of floats may miss the cap by crumbs.
        return self.cap_usd is None or self.spent_usd + self._reserved_usd + most_usd <= self.cap_usd + 1e-9
