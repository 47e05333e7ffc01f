from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chaccu.errors import DataError, UsageError
from chaccu.judge.budget import Budget, Price, count_by_bytes, read_prices
from chaccu.judge.judges import Judge, parse_judges


def test_a_price_is_per_million_tokens() -> None:
    assert Price(2.5, 10.0).cost_usd(1_000_000, 100_000) == 3.5


def test_four_bytes_are_taken_for_a_token() -> None:
    assert count_by_bytes(["abcd", "efghi"]) == 3
    # Of Chinese a token is about one letter, not four.
    assert count_by_bytes(["小羊驼是什么"]) == 5


async def test_what_is_under_way_counts_until_it_is_settled() -> None:
    budget = Budget(1.0)
    assert await budget.reserve(0.6)
    waiting = asyncio.ensure_future(budget.reserve(0.6))
    await asyncio.sleep(0)
    assert not waiting.done()
    budget.settle(0.6, 0.1)
    assert await waiting
    budget.settle(0.6, 0.6)
    assert budget.spent_usd == pytest.approx(0.7)
    assert not budget.is_closed


async def test_what_does_not_fit_closes_the_budget() -> None:
    budget = Budget(1.0)
    assert await budget.reserve(0.9)
    waiting = [asyncio.ensure_future(budget.reserve(0.2)) for _ in range(3)]
    await asyncio.sleep(0)
    budget.settle(0.9, 0.9)
    assert await asyncio.gather(*waiting) == [False, False, False]
    assert budget.is_closed
    assert not await budget.reserve(0.0)


async def test_without_a_cap_it_only_adds_up() -> None:
    budget = Budget()
    assert await budget.reserve(1e9)
    budget.settle(1e9, 2.0)
    assert (budget.spent_usd, budget.is_closed) == (2.0, False)


def test_prices_are_read_by_judge(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('["org/gpt-4"]\ninput = 2.5\noutput = 10\n')
    assert read_prices(tmp_path / "p.toml") == {"org/gpt-4": Price(2.5, 10.0)}


@pytest.mark.parametrize("text", ["gpt = 3\n", "[gpt]\ninput = 1\n", "[gpt]\ninput = -1\noutput = 1\n", "nonsense"])
def test_what_is_no_price_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(DataError, match=r"p\.toml"):
        read_prices(tmp_path / "p.toml")


def test_judges_have_names_servers_and_keys() -> None:
    price = Price(1.0, 2.0)
    one, other = parse_judges(["gpt", "llama=http://h:1/v1,key-env=KEY"], "http://g:2", prices={"gpt": price})
    assert one == Judge("gpt", "http://g:2/v1", None, price)
    assert other == Judge("llama", "http://h:1/v1", "KEY", None)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a"], "has no URL"),
        (["a=http://h", "a=http://g"], "there twice"),
        (["=http://h"], "is no judge"),
        (["a=http://h,weight=1"], "is no judge"),
        (["a=ftp://h"], "no URL of a server"),
    ],
)
def test_what_is_no_judge_is_refused(texts: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_judges(texts, None)
