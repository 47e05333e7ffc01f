"""Which upstream gets a request, and when one that failed is asked again."""

from __future__ import annotations

from typing import Any

import pytest

from chaccu.errors import UsageError
from chaccu.serve.gateway import Upstream, parse_upstream
from chaccu.serve.gateway.upstreams.routing import UpstreamBreaker, UpstreamLoad, choose_upstream
from chaccu.serve.gateway.upstreams.server import UpstreamServer


def load(outstanding: int = 0, last_given_s: float = 0.0, **more: Any) -> UpstreamLoad:
    return UpstreamLoad(outstanding=outstanding, last_given_s=last_given_s, **more)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([], None),
        ([load(5)], 0),
        ([load(is_left_out=True)], None),
        ([load(has_failed=True)], 0),
        ([load(2), load(1), load(3)], 1),
        ([load(1, 9.0), load(1, 7.0), load(1, 8.0)], 1),
        ([load(0, is_left_out=True), load(9)], 1),
        ([load(0, has_failed=True), load(9)], 1),
        ([load(0, has_failed=True), load(9, is_left_out=True)], 0),
        ([load(1, weight=1), load(2, weight=2)], 1),
        ([load(1, weight=1), load(3, 1.0, weight=2)], 0),
        ([load(9, priority=1), load(0)], 0),
        ([load(9, priority=1, is_left_out=True), load(0), load(1)], 1),
        ([load(9, priority=1, has_failed=True), load(0)], 1),
    ],
)
def test_the_least_outstanding_of_those_in_use_is_chosen(loads: list[UpstreamLoad], chosen: int | None) -> None:
    assert choose_upstream(loads) == chosen


def test_an_upstream_that_fails_is_left_out_until_a_probe_is_answered() -> None:
    clock = Clock()
    breaker = UpstreamBreaker(clock, first_s=0.25, longest_s=1.0)
    assert not breaker.is_left_out
    assert breaker.fail()
    # Those that were under way fail too, and change nothing.
    assert not breaker.fail()
    assert (breaker.is_left_out, breaker.probe_in_s) == (True, 0.25)
    waits = []
    for _ in range(4):
        clock.now_s += breaker.probe_in_s
        breaker.end_probe(False)
        waits.append(breaker.probe_in_s)
    assert waits == [0.5, 1.0, 1.0, 1.0]
    clock.now_s += 5
    assert breaker.probe_in_s == 0
    breaker.end_probe(True)
    assert (breaker.is_left_out, breaker.since_s) == (False, clock.now_s)


def test_one_that_answers_probes_alone_is_asked_less_and_less() -> None:
    clock = Clock()
    breaker = UpstreamBreaker(clock, first_s=0.25, longest_s=1.0)
    waits = []
    for _ in range(4):
        breaker.fail()
        waits.append(breaker.probe_in_s)
        breaker.end_probe(True)
    assert waits == [0.25, 0.5, 1.0, 1.0]
    breaker.succeed()
    breaker.fail()
    assert breaker.probe_in_s == 0.25


def test_an_upstream_is_named_with_its_options() -> None:
    named = parse_upstream("m=https://h:1/v1/,weight=2.5,priority=-1,as=org/big,key-env=KEY,continues=false")
    assert named == Upstream(
        "m", "https://h:1/v1", weight=2.5, priority=-1, remote_model="org/big", key_env="KEY", continues=False
    )
    for wrong, why in (
        ("m=http://h,wait=2", "has the option 'wait=2'"),
        ("m=http://h,weight=", "has the option 'weight='"),
        ("m=http://h,weight=x", "weight"),
        ("m=http://h,priority=1.5", "priority"),
        ("m=http://h,weight=0", "has the weight 0"),
        ("m=http://h,continues=perhaps", "true or false"),
    ):
        with pytest.raises(UsageError, match=why):
            parse_upstream(wrong)


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream("m", "http://me:secret@h/v1", key_env="KEY")
    with pytest.raises(UsageError, match="'KEY' holds no API key"):
        UpstreamServer(upstream, Clock(), lambda: None)
    monkeypatch.setenv("KEY", "secret\r\nx: y")
    with pytest.raises(UsageError, match="'KEY' holds no API key") as wrong:
        UpstreamServer(upstream, Clock(), lambda: None)
    assert "secret" not in str(wrong.value)
    monkeypatch.setenv("KEY", "secret-key")
    server = UpstreamServer(upstream, Clock(), lambda: None)
    assert server.status().upstream == "http://h:80/v1"
    assert b"authorization: Bearer secret-key\r\n" in server.write_request("chat/completions", b"{}", b"x-request-id: id\r\n")


def test_a_model_is_asked_for_by_its_name_there() -> None:
    server = UpstreamServer(Upstream("m", "http://h/v1", remote_model="org/big"), Clock(), lambda: None)
    body = server.write_request(
        "completions", b'{"model": "m", "prompt": "m", "temperature": 0.10}', b"x-request-id: id\r\n"
    ).partition(b"\r\n\r\n")[2]
    assert body == b'{"model":"org/big","prompt":"m","temperature":0.10}'
