from __future__ import annotations

import pytest

from chaccu.errors import UsageError
from chaccu.judge.addresses import ModelAddress, parse_addresses


def test_names_with_and_without_a_server_of_their_own() -> None:
    assert parse_addresses(["a", "b=http://h:1", "c=h:2,key-env=C_KEY", "a"], "http://g:9") == [
        ModelAddress("a", "http://g:9/v1"),
        ModelAddress("b", "http://h:1/v1"),
        ModelAddress("c", "http://h:2/v1", "C_KEY"),
    ]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a"], "has no URL"),
        (["=http://h:1"], "is no model"),
        (["a=http://h:1,key=x"], "is no model"),
        (["a=http://h:1,key-env="], "is no model"),
        (["a=http://h:1", "a=http://h:2"], "is there twice"),
        (["a=http://"], "is no URL"),
    ],
)
def test_what_is_no_model_is_refused(texts: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_addresses(texts, None)


def test_keys_are_those_of_the_variable() -> None:
    assert ModelAddress("a", "u").find_key("given", {}) == "given"
    assert ModelAddress("a", "u", "KEY").find_key("given", {"KEY": "own"}) == "own"
    with pytest.raises(UsageError, match="KEY holds no API key for a"):
        ModelAddress("a", "u", "KEY").find_key("given", {"KEY": ""})
