"""Aliases: names that stand for models, by weight."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaccu.errors import UsageError
from chaccu.serve.gateway.access.aliases import Aliases, parse_alias


def always(model: str) -> bool:
    return True


def test_a_name_that_is_no_alias_stays() -> None:
    assert Aliases({}).resolve("tuned", always) == "tuned"
    assert Aliases({"gpt": {"tuned": 1}}).resolve("gpt", always) == "tuned"


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 20), min_size=1), st.integers(1, 200))
def test_every_run_of_requests_is_shared_by_weight(shares: dict[str, int], count: int) -> None:
    aliases = Aliases({"name": shares})
    seen = Counter(aliases.resolve("name", always) for _ in range(count))
    for model, weight in shares.items():
        assert abs(seen[model] - count * weight / sum(shares.values())) <= len(shares)


def test_the_split_is_exact_over_a_round() -> None:
    aliases = Aliases({"name": {"a": 9, "b": 1}})
    assert Counter(aliases.resolve("name", always) for _ in range(30)) == {"a": 27, "b": 3}


def test_a_model_that_is_not_served_is_left_out() -> None:
    aliases = Aliases({"name": {"a": 9, "b": 1}})
    assert {aliases.resolve("name", lambda model: model == "b") for _ in range(20)} == {"b"}
    assert aliases.resolve("name", lambda model: False) in {"a", "b"}


def test_aliases_are_set_and_removed() -> None:
    aliases = Aliases({"one": {"a": 1}})
    aliases.set("one", {"b": 1})
    assert aliases.shares() == {"one": {"b": 1}}
    assert aliases.remove("one")
    assert not aliases.remove("one")
    assert aliases.resolve("one", always) == "one"


@pytest.mark.parametrize(
    ("name", "shares", "text"),
    [
        ("", {"a": 1}, "is no name"),
        ("x", {}, "stands for no model"),
        ("x", {"a": 0}, "weight 0"),
        ("x", {"a": float("nan")}, "weight nan"),
        ("x", {"x": 1}, "which is an alias"),
        ("x", {"one": 1}, "which is an alias"),
        ("a", {"b": 1}, "another alias stands for"),
    ],
)
def test_wrong_aliases_are_refused(name: str, shares: dict[str, float], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Aliases({"one": {"a": 1}}).set(name, shares)


def test_aliases_are_written_in_one_word() -> None:
    assert parse_alias("gpt-3.5-turbo=tuned") == ("gpt-3.5-turbo", {"tuned": 1})
    assert parse_alias("one=scripted:a") == ("one", {"scripted:a": 1})
    assert parse_alias("chat=tuned:9,base:1") == ("chat", {"tuned": 9, "base": 1})
    for wrong in ("", "a", "a=", "=b", "a=b:1,c", "a=b:x,c:1"):
        with pytest.raises(UsageError, match="is no alias"):
            parse_alias(wrong)
