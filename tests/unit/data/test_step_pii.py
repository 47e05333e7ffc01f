from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from chaccu.data.outcome import Changed, Drop
from chaccu.data.steps.pii import Pii, find_cards, find_emails, find_ips, find_phones, find_secrets, has_luhn_sum

from .talks import talk, texts_of

JWT = "eyJhbGciOiJIUzI1NiJ9" + ".eyJ1aWQiOiJiaWxsIiwiaWF0IjoxfQ" + ".WhUyvmnVeW8wGV5fkVyje3xL"


def found_in(find: Callable[..., Any], text: str) -> list[str]:
    return [text[start:end] for start, end in find(text, ("US", "DE"))]


@pytest.mark.parametrize(
    ("find", "text", "found"),
    [
        (find_emails, "write to ann.lee+x@mail.school.edu.", ["ann.lee+x@mail.school.edu"]),
        (find_emails, r"marlene\_z@post.de replied", [r"marlene\_z@post.de"]),
        (find_emails, "git@github.com:a/b, user@example.com, me@localhost, a @b, x@y", []),
        (find_phones, "call (312) 814-7167 or +44 20 7946 0018", ["(312) 814-7167", "+44 20 7946 0018"]),
        (find_phones, "order 423-32442-21332, 2023-03-15, 192.168.1.10, 1234567890123", []),
        (find_cards, "pay with 4539 1488 0343 6467 or 4539148803436467", ["4539 1488 0343 6467", "4539148803436467"]),
        (find_cards, "test 4242 4242 4242 4242; 4539148803436468; 5 10 15 20 25 30 40 50 60 70; 4539148803436467.5", []),
        (find_secrets, "key AKIA" + "Q7WERTY2UIOP3ASD end", ["AKIA" + "Q7WERTY2UIOP3ASD"]),
        (find_secrets, f"token {JWT}", [JWT]),
        (find_secrets, "sk-" + "x" * 40 + " and sk-your-key-goes-here-1234567890abcdefghij, AKIAIOSFODNN7EXAMPLE", []),
        (find_ips, "host 93.184.216.34 and 2a00:1450:4001:81b::200e", ["93.184.216.34", "2a00:1450:4001:81b::200e"]),
        (find_ips, "127.0.0.1, 10.0.0.5, 192.168.0.1, 1.1.2.1 heading, 999.1.1.1, 8.8.8.8, 12:30:45", []),
    ],
)
def test_finds_what_is_real_and_leaves_what_is_not(find: Callable[..., Any], text: str, found: list[str]) -> None:
    assert found_in(find, text) == found


def test_luhn() -> None:
    assert has_luhn_sum("79927398713")
    assert not any(has_luhn_sum(f"7992739871{last}") for last in "012456789")


def test_off_by_default_and_questions_only_when_asked() -> None:
    conversation = talk("I am ann@mail.org", "Hello ann@mail.org, call +44 20 7946 0018")
    assert Pii()(conversation) is conversation
    outcome = Pii(email="mask")(conversation)
    assert isinstance(outcome, Changed)
    assert outcome.reasons == ("email masked",)
    assert texts_of(outcome) == ["I am ann@mail.org", "Hello [EMAIL], call +44 20 7946 0018"]
    both = Pii(email="mask", phone="mask", questions=True)(conversation)
    assert texts_of(both) == ["I am [EMAIL]", "Hello [EMAIL], call [PHONE]"]


def test_drop_takes_the_round() -> None:
    conversation = talk("q", "fine", "r", "key AKIA" + "Q7WERTY2UIOP3ASD", "s", "mail x@y.org")
    outcome = Pii(secret="drop", email="mask")(conversation)
    assert isinstance(outcome, Changed)
    assert outcome.reasons == ("secret found", "email masked")
    assert texts_of(outcome) == ["q", "fine", "s", "mail [EMAIL]"]
    assert Pii(email="drop")(talk("q", "x@y.org")) == Drop("email found")
